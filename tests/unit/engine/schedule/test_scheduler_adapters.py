"""Batching with adapters: loads, overtaking, plans and failed loads."""

from types import SimpleNamespace

from loraserve.engine.schedule.events import (
    AdapterLoadFailed,
    CopiesRequested,
    CopiesRetired,
    EvictAdapter,
    LeftSlab,
    PlanReady,
    RequestAborted,
)
from loraserve.engine.schedule.steps import MAX_OVERTAKEN

PROMPT = [1] * 8


def resident(helpers: SimpleNamespace, *versions: str, **limits: int) -> SimpleNamespace:
    """Return an idle desk with these adapters resident, after one request for each."""
    desk = helpers.Desk(**limits)
    for version in versions:
        desk.arrive(f"warm-{version}", [2], helpers.adapter(version), max_tokens=1)
        desk.loaded(version)
        desk.step_done()
    return desk


def test_a_request_that_waits_for_its_adapter_does_not_delay_others(helpers: SimpleNamespace) -> None:
    desk = resident(helpers, "here")
    desk.arrive("loads", [1], helpers.adapter("away"))
    assert desk.loads == ["away"]
    assert desk.step is None
    desk.arrive("base", [1])
    desk.arrive("other", [1], helpers.adapter("here"))
    desk.step_done()
    assert desk.sizes == {"base": 1, "other": 1}
    for _ in range(3):
        desk.step_done()
    assert (len(desk.output["base"]), len(desk.output["other"]), desk.output["loads"]) == (4, 3, [])
    desk.loaded("away")
    desk.step_done()
    assert desk.sizes == {"base": 1, "other": 1, "loads": 1}


def test_requests_use_their_adapters_slot_and_base_requests_none(helpers: SimpleNamespace) -> None:
    desk = resident(helpers, "a", "b")
    for name, version in (("ra", "a"), ("rb", "b"), ("ra2", "a")):
        desk.arrive(name, [1], helpers.adapter(version))
    desk.arrive("base", [1])
    desk.step_done()
    slots = {s.request_id: s.slot for s in desk.step.sequences}
    entries = {e.adapter.version: e.slot for e in desk.scheduler.residency.pool.entries()}
    assert slots == {"ra": entries["a"], "rb": entries["b"], "ra2": entries["a"], "base": -1}
    assert entries["a"] != entries["b"]


def test_one_load_serves_all_waiting_requests(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    for name in ("first", "second"):
        desk.arrive(name, [1], helpers.adapter("a"))
    assert desk.loads == ["a"]
    desk.loaded("a")
    assert desk.sizes == {"first": 1, "second": 1}


def test_a_running_request_keeps_its_adapter(helpers: SimpleNamespace) -> None:
    desk = resident(helpers, "a", pool_bytes=helpers.UNIT)
    desk.arrive("runs", [1], helpers.adapter("a"), max_tokens=2)
    desk.arrive("waits", [1], helpers.adapter("b"))
    desk.step_done()
    assert desk.loads == []
    instructions = desk.step_done()
    (evicted,) = [each for each in instructions if isinstance(each, EvictAdapter)]
    assert (evicted.version, evicted.slot, evicted.left) == ("a", 0, LeftSlab(helpers.adapter("a"), 0))
    assert desk.loads == ["b"]
    desk.loaded("b")
    assert desk.sizes == {"waits": 1}


def test_overtaking_a_request_that_waits_for_room_is_limited(helpers: SimpleNamespace) -> None:
    desk = resident(helpers, "busy", pool_bytes=helpers.UNIT, max_waiting=1000)
    desk.arrive("runs", [1], helpers.adapter("busy"), max_tokens=2)
    desk.arrive("patient", [1], helpers.adapter("wanted"))
    passed = 0
    while not desk.loads:
        # The adapter in the pool is always in use, so that only holding back its requests makes room.
        desk.arrive(f"quick-{passed}", [1], helpers.adapter("busy"), max_tokens=2)
        desk.step_done()
        passed += 1
        assert passed < 2 * MAX_OVERTAKEN, "the request starves"
    assert passed >= MAX_OVERTAKEN
    desk.arrive("base", [1])
    assert desk.sizes == {"base": 1}, "base requests need no room and are never held back"
    desk.loaded("wanted")
    desk.step_done()
    assert "patient" in desk.sizes


def test_only_adapters_in_the_way_are_held_back(helpers: SimpleNamespace) -> None:
    desk = resident(helpers, "busy", "other", max_waiting=1000, max_running=8, kv_blocks=64)
    arrived = 0
    while not desk.loads:
        # A long request runs with each adapter at all times; short ones overtake the waiting request.
        if arrived % 4 == 0:
            name = ("busy", "other")[arrived // 4 % 2]
            desk.arrive(f"long-{arrived}", [1], helpers.adapter(name), max_tokens=12)
        if arrived == 8:
            desk.arrive("patient", [1], helpers.adapter("wanted"))
        desk.arrive(f"quick-{arrived}", [1], helpers.adapter("busy"), max_tokens=1)
        arrived += 1
        desk.step_done()
        assert arrived < 8 + 2 * MAX_OVERTAKEN, "the request starves"
    assert arrived >= MAX_OVERTAKEN / 2, "there was room without holding back others"
    (stayed,) = (version for version in ("busy", "other") if version in desk.scheduler.residency.pool)
    desk.arrive("late", [1], helpers.adapter(stayed), max_tokens=1)
    for _ in range(4):
        desk.step_done()
    assert "late" in desk.finish, "an adapter that is not in the way must go on"


def test_a_second_place_is_reserved_if_the_first_takes_long(helpers: SimpleNamespace) -> None:
    desk = resident(helpers, "long", "short", max_waiting=1000, max_running=8, kv_blocks=256, max_model_tokens=1000)
    desk.arrive("endless", [1], helpers.adapter("long"), max_tokens=900)
    desk.arrive("first", [1], helpers.adapter("short"), max_tokens=3)
    desk.arrive("patient", [1], helpers.adapter("wanted"))
    arrived = 0
    while not desk.loads:
        # One request runs with adapter "long", and always two with "short".
        for _ in range(2):
            desk.arrive(f"short-{arrived}", [1], helpers.adapter("short"), max_tokens=2 + arrived % 3)
            arrived += 1
        desk.step_done()
        assert "endless" not in desk.finish, "another place must have been reserved"
    assert arrived >= MAX_OVERTAKEN
    desk.loaded("wanted")
    desk.step_done()
    assert "patient" in desk.sizes


def test_only_the_first_overtaken_request_reserves_room(helpers: SimpleNamespace) -> None:
    desk = resident(helpers, "busy", "other", max_waiting=1000, max_running=8, kv_blocks=256, max_model_tokens=1000)
    for name in ("busy", "other"):
        desk.arrive(f"endless-{name}", [1], helpers.adapter(name), max_tokens=900)
    desk.arrive("first", [1], helpers.adapter("wanted"))
    desk.arrive("second", [1], helpers.adapter("wanted-too"))
    ended = 0
    for arrived in range(MAX_OVERTAKEN + 20):
        name = ("busy", "other")[arrived % 2]
        desk.arrive(f"quick-{arrived}", [1], helpers.adapter(name), max_tokens=1)
        desk.step_done()
        ended = sum(request_id.startswith("quick") for request_id in desk.finish)
    assert MAX_OVERTAKEN < ended < MAX_OVERTAKEN + 20, "one of the two adapters must go on"


def test_a_failed_load_rejects_the_waiting_requests_with_the_reason(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("base", PROMPT)
    desk.arrive("first", [1], helpers.adapter("bad"))
    desk.arrive("second", [1], helpers.adapter("bad"))
    desk.arrive("other", [1], helpers.adapter("good"))
    desk.tell(AdapterLoadFailed("bad", "corrupt", "the digest is wrong"))
    assert desk.rejected.keys() == {"first", "second"}
    assert desk.rejected["first"].code == "adapter_unavailable"
    assert desk.rejected["first"].message == "adapter name-bad could not be loaded: the digest is wrong"
    desk.loaded("good")
    desk.step_done()
    assert desk.sizes.keys() == {"base", "other"}
    assert any("corrupt: the digest is wrong" in line for line in desk.scheduler.story.lines("bad"))


def test_a_failed_load_is_tried_again_for_the_next_request(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("first", [1], helpers.adapter("a"))
    assert EvictAdapter("a", 0, "name-a", "its load failed or was cancelled") in desk.tell(
        AdapterLoadFailed("a", "timeout", "slow")
    )
    assert desk.scheduler.load().memory.pool_free_bytes == 2 * helpers.UNIT
    desk.arrive("second", [1], helpers.adapter("a"))
    desk.loaded("a")
    assert desk.sizes == {"second": 1}


def test_an_adapter_that_can_never_fit_is_refused_with_the_remedy(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("r", [1], helpers.adapter("huge", units=3))
    assert desk.rejected["r"].code == "adapter_unavailable"
    assert "raise engine.pool_bytes" in desk.rejected["r"].message
    assert desk.loads == []


def test_a_request_that_waits_for_a_load_can_be_aborted(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("gone", [1], helpers.adapter("a"))
    desk.tell(RequestAborted("gone"))
    assert desk.scheduler.is_idle
    desk.loaded("a")
    assert desk.step is None
    desk.arrive("next", [1], helpers.adapter("a"))
    assert desk.sizes == {"next": 1}


def test_an_abort_in_a_step_releases_the_adapter_after_the_step(helpers: SimpleNamespace) -> None:
    desk = resident(helpers, "a", pool_bytes=helpers.UNIT)
    desk.arrive("gone", PROMPT, helpers.adapter("a"))
    desk.arrive("waits", [1], helpers.adapter("b"))
    desk.tell(RequestAborted("gone"))
    assert desk.loads == [], "the step in flight still reads the slab"
    desk.step_done()
    assert desk.loads == ["b"]
    assert desk.scheduler.load().memory.kv_blocks_free == 16


def test_equal_prompts_of_two_versions_share_no_blocks(helpers: SimpleNamespace) -> None:
    desk = resident(helpers, "v1", "v2")
    for name, version in (("base", ""), ("one", "v1"), ("two", "v2"), ("again", "v1")):
        desk.arrive(name, PROMPT, helpers.adapter(version) if version else None, max_tokens=1)
        part = desk.part(name)
        assert part.start == (4 if name == "again" else 0), name
        desk.step_done()
    assert desk.cached == {"warm-v1": 0, "warm-v2": 0, "base": 0, "one": 0, "two": 0, "again": 4}


def test_a_plan_is_prepared_pinned_and_retired(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    assert PlanReady(5, {}) not in desk.tell(CopiesRequested(5, (helpers.adapter("a"), helpers.adapter("b"))))
    assert desk.loads == ["a", "b"]
    desk.loaded("a")
    assert desk.loaded("b") == [PlanReady(5, {})]
    assert [(a.version, a.pinned) for a in desk.scheduler.load().adapters.resident] == [("a", True), ("b", True)]
    desk.tell(CopiesRetired(6, ("b",)))
    assert [(a.version, a.pinned) for a in desk.scheduler.load().adapters.resident] == [("a", False), ("b", True)]
    desk.arrive("r", [1], helpers.adapter("c"))
    assert [a.version for a in desk.scheduler.load().adapters.resident] == ["b"]


def test_a_plan_is_answered_with_its_failed_copies(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.tell(CopiesRequested(5, (helpers.adapter("a"), helpers.adapter("b"))))
    desk.loaded("b")
    assert PlanReady(5, {"a": "gone"}) in desk.tell(AdapterLoadFailed("a", "not_found", "gone"))


def test_a_plan_waits_for_room_that_running_requests_will_free(helpers: SimpleNamespace) -> None:
    """Requests follow each other with the same adapter. Its copy may be evicted once they have ended."""
    desk = resident(helpers, "a", pool_bytes=helpers.UNIT)
    desk.arrive("first", [1], helpers.adapter("a"), max_tokens=1)
    desk.tell(CopiesRequested(1, (helpers.adapter("b"),)))
    desk.arrive("second", [1], helpers.adapter("a"), max_tokens=1)
    assert desk.step_done() != [], "first ends, second runs"
    assert desk.sizes == {"second": 1}
    desk.step_done()
    assert desk.loads == ["b"]
    assert desk.loaded("b") == [PlanReady(1, {})]


def test_a_plan_that_does_not_fit_is_answered_when_nothing_runs(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(pool_bytes=helpers.UNIT)
    desk.tell(CopiesRequested(1, (helpers.adapter("a"), helpers.adapter("b"))))
    (answer,) = desk.loaded("a")
    assert answer.failed == {"b": "no room beside what the plan pins; raise engine.pool_bytes"}
