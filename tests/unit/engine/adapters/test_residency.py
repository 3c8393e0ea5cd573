"""Which adapter is loaded when: requests before the plan, a few at once, and every plan gets its answer."""

from collections.abc import Collection

import msgspec

from loraserve.engine.adapters.pool import AdapterPool, Placed
from loraserve.engine.adapters.residency import Residency
from loraserve.engine.schedule.events import (
    EvictAdapter,
    Instruction,
    LeftSlab,
    LoadAdapter,
    PlanReady,
    SchedulerLimits,
)
from loraserve.messages import AdapterRef
from loraserve.story import Story

UNIT = 4096
LIMITS = SchedulerLimits(
    kv_blocks=8,
    block_tokens=4,
    pool_bytes=2 * UNIT,
    max_adapters=8,
    max_running=4,
    max_waiting=4,
    max_step_tokens=16,
    max_model_tokens=32,
    eos_token_ids=frozenset(),
)
A, B, C, D = (AdapterRef(name=name.upper(), version=name, rank=8, slab_bytes=UNIT) for name in "abcd")
HUGE = AdapterRef(name="HUGE", version="huge", rank=8, slab_bytes=3 * UNIT)


def residency(units: int = 2, loaded: tuple[AdapterRef, ...] = (), max_loads: int = 2) -> Residency:
    limits = msgspec.structs.replace(LIMITS, pool_bytes=units * UNIT, max_loads=max_loads)
    made = Residency(limits, Story())
    for now, adapter in enumerate(loaded):
        assert loads(made.start_loads([adapter], float(now), idle=True)) == [adapter.version]
        made.complete_load(adapter.version)
    return made


def loads(instructions: list[Instruction]) -> list[str]:
    return [i.adapter.version for i in instructions if isinstance(i, LoadAdapter)]


def evictions(instructions: list[Instruction]) -> list[str]:
    return [i.version for i in instructions if isinstance(i, EvictAdapter)]


def answers(instructions: list[Instruction]) -> list[PlanReady]:
    return [i for i in instructions if isinstance(i, PlanReady)]


def test_the_base_model_is_always_ready_and_an_adapter_once_it_is_loaded() -> None:
    made = residency()
    assert made.is_ready("")
    assert not made.is_ready("a")
    made.start_loads([A], 0.0, idle=True)
    assert not made.is_ready("a"), "it is still on its way"
    made.complete_load("a")
    assert made.is_ready("a")


def test_requests_are_served_before_the_plan() -> None:
    made = residency()
    made.prepare_plan(1, (B, C))
    assert loads(made.start_loads([A], 0.0, idle=True)) == ["a", "b"]


def test_a_plan_for_which_other_pins_leave_no_room_is_answered_though_requests_run() -> None:
    made = residency(units=3, loaded=(A, B))
    made.prepare_plan(1, (A,))
    made.pool.start_running("b", 2.0)
    made.prepare_plan(2, (HUGE, C))
    begun = made.start_loads([], 3.0, idle=False)
    assert (loads(begun), answers(begun)) == (["c"], []), "beside the pin of the first plan there is no room for HUGE"
    (answer,) = answers(made.complete_load("c"))
    assert (answer.epoch, list(answer.failed)) == (2, ["huge"])


def test_a_plan_waits_for_room_that_a_running_request_will_leave() -> None:
    made = residency(units=2, loaded=(A, B))
    made.prepare_plan(1, (A,))
    made.pool.start_running("b", 2.0)
    made.prepare_plan(2, (C,))
    assert made.start_loads([], 3.0, idle=False) == [], "what runs may end and make room"
    made.pool.stop_running("b", 4.0)
    assert loads(made.start_loads([], 4.0, idle=False)) == ["c"]


def test_few_adapters_load_at_once() -> None:
    made = residency(units=8)
    assert loads(made.start_loads([A, B, C, D], 0.0, idle=True)) == ["a", "b"]
    made.complete_load("a")
    assert loads(made.start_loads([B, C, D], 1.0, idle=True)) == ["c"]
    made.fail_load("b", "gone")
    assert loads(made.start_loads([D], 2.0, idle=True)) == ["d"]


def test_an_adapter_that_is_loading_is_not_loaded_again() -> None:
    made = residency()
    made.prepare_plan(1, (A,))
    assert loads(made.start_loads([A, A], 0.0, idle=True)) == ["a"]
    assert made.start_loads([A], 1.0, idle=True) == []


def test_no_adapter_of_a_request_is_evicted_for_a_later_request() -> None:
    made = residency(loaded=(A, B))
    assert made.start_loads([A, B, C], 5.0, idle=True) == []
    found = made.start_loads([A, C], 6.0, idle=True)
    assert (evictions(found), loads(found)) == (["b"], ["c"])


def test_an_eviction_comes_before_the_load_that_needs_it() -> None:
    found = residency(loaded=(A, B)).start_loads([C], 5.0, idle=True)
    assert [type(i) for i in found] == [EvictAdapter, LoadAdapter]
    evict, load = found
    assert isinstance(evict, EvictAdapter)
    assert isinstance(load, LoadAdapter)
    assert (evict.version, load.offset_bytes) == ("a", 0)
    assert evict.left == LeftSlab(A, 0), "it lies there until the load begins"


def test_a_plan_is_answered_when_all_its_adapters_are_resident_and_pinned() -> None:
    made = residency(loaded=(A,))
    assert made.prepare_plan(7, (A, B)) == []
    made.start_loads([], 1.0, idle=True)
    assert made.complete_load("b") == [PlanReady(7, {})]
    assert [entry.planned for entry in made.pool.entries()] == [True, True]
    assert made.start_loads([], 2.0, idle=True) == [], "it is answered once"


def test_an_empty_plan_or_one_of_resident_adapters_is_answered_at_once() -> None:
    made = residency(loaded=(A,))
    assert made.prepare_plan(1, (A,)) == [PlanReady(1, {})]
    assert made.prepare_plan(2, ()) == [PlanReady(2, {})]


def test_the_answer_names_the_adapters_that_failed_with_their_reasons() -> None:
    made = residency()
    assert made.prepare_plan(3, (HUGE, A)) == []
    made.start_loads([], 0.0, idle=True)
    evict, answer = made.fail_load("a", "corrupt: bad digest")
    assert evict == EvictAdapter("a", 0, "A", "its load failed or was cancelled")
    assert isinstance(answer, PlanReady)
    assert answer.epoch == 3
    assert answer.failed["a"] == "corrupt: bad digest"
    assert "raise engine.pool_bytes" in answer.failed["huge"]


def test_a_newer_plan_ends_the_one_before() -> None:
    made = residency()
    made.prepare_plan(1, (A, B))
    made.start_loads([], 0.0, idle=True)
    made.complete_load("a")
    ended = made.prepare_plan(2, (B,))
    assert ended == [PlanReady(1, {"b": "a newer plan came"})]
    assert made.complete_load("b") == [PlanReady(2, {})], "a load that was under way serves the newer plan"


def test_a_plan_fails_an_adapter_for_which_only_its_own_pins_could_leave() -> None:
    made = residency()
    made.prepare_plan(1, (A, B, C))
    made.start_loads([], 0.0, idle=True)
    made.complete_load("a")
    assert answers(made.start_loads([], 1.0, idle=True)) == [], "b is still on its way and may fail"
    made.complete_load("b")
    (answer,) = answers(made.start_loads([], 2.0, idle=False))
    assert answer.failed.keys() == {"c"}
    assert "raise engine.pool_bytes" in answer.failed["c"]


def test_a_request_drops_a_plan_pin_where_nothing_else_makes_room() -> None:
    made = residency(loaded=(A, B))
    made.prepare_plan(1, (A,))
    assert evictions(made.start_loads([C], 5.0, idle=True)) == ["b"]
    made.complete_load("c")
    assert evictions(made.start_loads([C, D], 6.0, idle=True)) == ["a"]


def test_retired_copies_lose_their_pin_and_stay_until_evicted() -> None:
    made = residency(loaded=(A, B))
    made.prepare_plan(1, (A, B))
    for _ in range(2):
        assert made.retire_copies(1, keep=("b",)) == []
        assert pins(made) == {"b": 1}
    assert made.is_ready("a")
    assert evictions(made.start_loads([C], 5.0, idle=True)) == ["a"]


def pins(made: Residency) -> dict[str, int]:
    """Return the epochs of the plan's pins by version."""
    return {e.adapter.version: e.plan_epoch for e in made.pool.entries() if e.planned}


def test_a_late_retire_of_an_older_plan_leaves_what_a_newer_one_pinned() -> None:
    made = residency(units=4, loaded=(A, B, C))
    made.prepare_plan(4, (A, B))
    made.prepare_plan(5, (B, C))
    made.retire_copies(4, keep=())
    assert pins(made) == {"b": 5, "c": 5}, "b was wanted by both"
    made.retire_copies(5, keep=("b",))
    assert pins(made) == {"b": 5}


def test_a_retire_gives_up_missing_adapters_of_a_plan_never_published() -> None:
    made = residency(units=4, loaded=(A,))
    made.prepare_plan(4, (A,))
    assert made.prepare_plan(5, (A, B, C, D)) == []
    assert loads(made.start_loads([], 1.0, idle=True)) == ["b", "c"]
    (given_up,) = made.retire_copies(5, keep=("a",))
    assert isinstance(given_up, PlanReady)
    assert given_up.failed == dict.fromkeys("bcd", "epoch 5 does not include it")
    assert [*made.complete_load("b"), *made.complete_load("c"), *made.start_loads([], 2.0, idle=True)] == []
    assert pins(made) == {"a": 5}


def test_a_retire_of_an_older_plan_does_not_end_a_newer_preparation() -> None:
    made = residency()
    made.prepare_plan(5, (A,))
    made.start_loads([], 1.0, idle=True)
    assert made.retire_copies(4, keep=()) == []
    assert made.complete_load("a") == [PlanReady(5, {})]
    assert pins(made) == {"a": 5}


def test_a_plan_older_than_the_newest_is_refused() -> None:
    made = residency(units=4)
    made.prepare_plan(5, (A,))
    (late,) = made.prepare_plan(4, (B,))
    assert isinstance(late, PlanReady)
    assert (late.epoch, late.failed.keys()) == (4, {"b"})
    assert "older than epoch 5" in late.failed["b"]
    assert loads(made.start_loads([], 1.0, idle=True)) == ["a"]
    assert made.complete_load("a") == [PlanReady(5, {})], "the newer plan was not disturbed"


def test_the_newest_epoch_is_kept() -> None:
    made = residency(loaded=(A,))
    assert made.plan_epoch == 0
    made.prepare_plan(3, (A,))
    made.retire_copies(7, keep=())
    made.retire_copies(6, keep=())
    assert made.plan_epoch == 7


class CountingPool(AdapterPool):
    """A pool that counts the searches for room."""

    looks = 0

    def place(
        self, adapter: AdapterRef, now: float, keep: Collection[str] = (), drop_plan_pins: bool = False
    ) -> Placed | None:
        self.looks += 1
        return super().place(adapter, now, keep, drop_plan_pins)


def test_a_long_queue_before_a_full_pool_costs_one_search_per_size() -> None:
    made = residency(units=2)
    made.pool = pool = CountingPool(2 * UNIT, 8)
    for adapter in (A, B):
        made.start_loads([adapter], 0.0, idle=False)
        made.complete_load(adapter.version)
        pool.start_running(adapter.version, 0.0)
    pool.looks = 0
    queue = [msgspec.structs.replace(C, version=f"v{i}", slab_bytes=(2 - i % 2) * UNIT) for i in range(500)]
    assert made.start_loads([*queue, *queue], 1.0, idle=False) == []
    assert pool.looks == 4, "two sizes, with and without the plan's pins"


def test_a_smaller_adapter_loads_where_a_larger_one_found_no_room() -> None:
    made = residency(units=2, loaded=(A, B))
    made.pool.start_running("a", 0.0)
    double = msgspec.structs.replace(HUGE, slab_bytes=2 * UNIT)
    assert loads(made.start_loads([double, C], 1.0, idle=False)) == ["c"]


def test_while_steps_run_plan_loads_are_paced_and_requests_are_not() -> None:
    made = residency(units=8)
    made.prepare_plan(1, (A, B, C))
    assert loads(made.start_loads([], 0.0, idle=False, stepping=True)) == ["a"]
    assert loads(made.start_loads([D], 0.01, idle=False, stepping=True)) == ["d"]
    made.complete_load("a")
    assert loads(made.start_loads([D], 0.01, idle=False, stepping=True)) == [], "it rests"
    assert loads(made.start_loads([D], 0.1, idle=False, stepping=True)) == ["b"]
    made.complete_load("d")
    assert loads(made.start_loads([], 0.1, idle=False, stepping=False)) == ["c"], "nothing runs any more"
