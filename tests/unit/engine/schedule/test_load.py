"""The load that an engine reports: queues, memory, adapters and token counts."""

from types import SimpleNamespace

from loraserve.engine.schedule.report import IDLE_REPORTS, TokenCounts, describe_capabilities
from loraserve.messages import AdapterState, AdapterTokens, QueueLoad, ResidentAdapter


def test_an_idle_engine_reports_all_memory_as_free(helpers: SimpleNamespace) -> None:
    scheduler = helpers.Desk().scheduler
    load, capabilities = scheduler.load(), describe_capabilities(scheduler, "engine-0", "i1")
    assert load.queue == QueueLoad()
    assert scheduler.counters().steps == 0
    assert (capabilities.kv_blocks, load.memory.kv_blocks_free, capabilities.block_tokens) == (16, 16, 4)
    assert capabilities.pool_bytes == load.memory.pool_free_bytes == 2 * helpers.UNIT
    assert (capabilities.max_running, capabilities.max_model_tokens) == (4, 48)
    assert load.adapters == AdapterState()
    assert scheduler.counts.by_adapter() == ()


def test_requests_are_counted_by_queue(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(max_step_tokens=8, max_running=1)
    desk.arrive("runs", [1] * 12)
    desk.arrive("waits", [2] * 5)
    desk.step_done()
    load = desk.scheduler.load()
    assert (load.queue.waiting, load.queue.running) == (1, 1)
    assert sorted(load.queue.request_ids) == ["runs", "waits"]
    # Eight of the first request's twelve tokens are computed.
    assert load.queue.waiting_prefill_tokens == 4 + 5
    assert load.memory.kv_blocks_free == 16 - 3
    assert desk.scheduler.counters().steps == 2
    desk.step_done()
    assert desk.scheduler.load().queue.waiting_prefill_tokens == 5, "a decoding request has no prefill tokens left"


def test_adapters_are_listed_by_state(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("r", [1], helpers.adapter("a"))
    load = desk.scheduler.load()
    assert (load.adapters.resident, load.adapters.loading) == ((), ("a",))
    assert load.memory.pool_free_bytes == helpers.UNIT
    desk.loaded("a")
    load = desk.scheduler.load()
    held = ResidentAdapter(name="name-a", version="a", rank=8, slab_bytes=helpers.UNIT, pinned=False, running=1)
    assert (load.adapters.resident, load.adapters.loading) == ((held,), ())


def test_evictable_room_counts_as_free(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("r", [1], helpers.adapter("a"), max_tokens=1)
    desk.loaded("a")
    assert desk.scheduler.load().memory.pool_free_bytes == helpers.UNIT
    desk.step_done()
    assert desk.scheduler.load().memory.pool_free_bytes == 2 * helpers.UNIT


def test_tokens_are_counted_by_adapter_and_phase(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(max_step_tokens=8)
    desk.arrive("base", [1] * 12, max_tokens=3)
    for _ in range(4):
        desk.step_done()
    for name in ("one", "two"):
        desk.arrive(name, [2] * 3, helpers.adapter("a"), max_tokens=1)
        if desk.loads:
            desk.loaded("a")
        desk.step_done()
    assert desk.scheduler.counts.by_adapter() == (
        AdapterTokens(version="", prefill_tokens=12, decode_tokens=2, requests=1, span=1),
        AdapterTokens(version="a", prefill_tokens=6, decode_tokens=0, requests=2, span=2),
    )


def test_an_adapter_idle_for_many_reports_is_forgotten() -> None:
    counts = TokenCounts()
    counts.count_tokens("idle", 5, decode=False)
    counts.count_tokens("busy", 5, decode=False)
    for _ in range(IDLE_REPORTS):
        counts.mark_reported()
        counts.count_tokens("busy", 1, decode=True)
    assert [tokens.version for tokens in counts.by_adapter()] == ["idle", "busy"]
    counts.mark_reported()
    assert counts.by_adapter() == (
        AdapterTokens(version="busy", prefill_tokens=5, decode_tokens=IDLE_REPORTS, requests=0, span=2),
    )


def test_a_forgotten_adapter_counts_from_zero_in_a_new_span() -> None:
    counts = TokenCounts()
    counts.count_tokens("a", 5, decode=False)
    for _ in range(IDLE_REPORTS + 1):
        counts.mark_reported()
    counts.count_request("a")
    counts.count_tokens("a", 3, decode=False)
    assert counts.by_adapter() == (AdapterTokens(version="a", prefill_tokens=3, decode_tokens=0, requests=1, span=2),)


def test_only_recent_adapters_are_listed() -> None:
    counts = TokenCounts()
    for number in range(2000):
        counts.count_tokens(f"v{number}", 1, decode=False)
        counts.mark_reported()
        assert len(counts.by_adapter()) <= IDLE_REPORTS + 1
