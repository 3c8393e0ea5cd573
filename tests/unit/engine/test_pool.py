"""The pool: what is needed stays, what has been unused for longest goes first, and nothing goes in vain."""

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraserve.engine.pool import AdapterPool, Placed
from loraserve.messages import AdapterRef

MIN = 16
UNITS = (1, 1, 2, 2, 3, 4, 6, 8)


def ref(version: str, units: int = 1) -> AdapterRef:
    return AdapterRef(name=f"name-{version}", version=version, rank=8, slab_bytes=MIN * units)


def pool_with(*adapters: AdapterRef, units: int = 4, slots: int = 4) -> AdapterPool:
    """Each placed and loaded, one second after the other."""
    pool = AdapterPool(MIN * units, slots, MIN)
    for now, adapter in enumerate(adapters):
        assert pool.place(adapter, float(now)) is not None
        pool.loaded(adapter.version)
    return pool


def evicted(placed: Placed | None) -> list[str]:
    assert placed is not None
    return [entry.adapter.version for entry in placed.evicted]


class PoolMachine(RuleBasedStateMachine):
    """Against a model that keeps who is needed, and knows room by trying every aligned place."""

    @initialize(units=st.integers(1, 16), slots=st.integers(1, 5))
    def begin(self, units: int, slots: int) -> None:
        self.units = units
        self.slots = slots
        self.pool = AdapterPool(MIN * units, slots, MIN)
        self.adapters = [ref(f"v{index}", size) for index, size in enumerate(UNITS)]
        self.held: dict[str, tuple[int, int]] = {}
        self.loading: set[str] = set()
        self.running: dict[str, int] = {}
        self.planned: set[str] = set()
        self.now = 0.0

    def evictable(self, version: str, drop_plan_pins: bool) -> bool:
        needed = version in self.loading or self.running.get(version, 0) > 0
        return not needed and (drop_plan_pins or version not in self.planned)

    def room(self, size: int, staying: set[str]) -> bool:
        """Whether an aligned place for ``size`` bytes and a slot are free where only ``staying`` is left."""
        extents = [(self.held[v][0], self.held[v][0] + self.held[v][1]) for v in staying]
        start = 0
        for bit in range(self.units.bit_length(), -1, -1):
            if not self.units >> bit & 1:
                continue
            for first in range(start, start + (MIN << bit), size):
                inside = first + size <= start + (MIN << bit)
                if inside and all(end <= first or begin >= first + size for begin, end in extents):
                    return len(staying) < self.slots
            start += MIN << bit
        return False

    @rule(index=st.integers(0, len(UNITS) - 1), drop=st.booleans(), keep=st.sets(st.sampled_from(["v0", "v2", "v4"])))
    def place(self, index: int, drop: bool, keep: set[str]) -> None:
        adapter = self.adapters[index]
        if adapter.version in self.pool:
            return
        self.now += 1.0
        size = max(MIN, 1 << (adapter.slab_bytes - 1).bit_length())
        may_go = {v for v in self.held if v not in keep and self.evictable(v, drop)}
        placed = self.pool.place(adapter, self.now, keep, drop)
        assert (placed is not None) == self.room(size, self.held.keys() - may_go)
        if placed is None:
            return
        gone = set(evicted(placed))
        assert gone <= may_go, "something that is needed was evicted"
        assert not (gone and self.room(size, set(self.held))), "evicted in vain"
        self.planned -= gone
        for version in gone:
            del self.held[version]
        self.held[adapter.version] = (placed.offset_bytes, size)
        self.loading.add(adapter.version)

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), fails=st.booleans())
    def end_load(self, data: st.DataObject, fails: bool) -> None:
        version = data.draw(st.sampled_from(sorted(self.loading)))
        self.loading.remove(version)
        if fails:
            assert self.pool.load_failed(version).adapter.version == version
            del self.held[version]
            self.planned.discard(version)
        else:
            self.pool.loaded(version)

    @rule(data=st.data(), starts=st.booleans())
    def run(self, data: st.DataObject, starts: bool) -> None:
        ready = sorted(v for v in self.held if v not in self.loading and (starts or self.running.get(v, 0)))
        if ready:
            version = data.draw(st.sampled_from(ready))
            (self.pool.start_running if starts else self.pool.stop_running)(version, self.now)
            self.running[version] = self.running.get(version, 0) + (1 if starts else -1)

    @rule(index=st.integers(0, len(UNITS) - 1), wanted=st.booleans())
    def plan(self, index: int, wanted: bool) -> None:
        version = f"v{index}"
        changes = version in self.held and (version in self.planned) != wanted
        assert self.pool.plan(version, wanted) == changes
        if changes:
            (self.planned.add if wanted else self.planned.remove)(version)

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.validate()
        assert {entry.adapter.version for entry in self.pool.entries()} == self.held.keys()
        assert self.pool.loading == len(self.loading)
        needed = sum(size for v, (_, size) in self.held.items() if not self.evictable(v, drop_plan_pins=False))
        assert self.pool.free_bytes == MIN * self.units - needed
        extents = sorted((start, start + size) for start, size in self.held.values())
        assert all(before[1] <= after[0] for before, after in pairwise(extents))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def test_the_longest_unused_goes_first() -> None:
    pool = pool_with(ref("a"), ref("b"), ref("c"), ref("d"))
    pool.start_running("a", 10.0)
    pool.stop_running("a", 11.0)
    assert evicted(pool.place(ref("e"), 12.0)) == ["b"]
    assert evicted(pool.place(ref("f"), 13.0)) == ["c"]


def test_no_more_leaves_than_the_new_one_needs() -> None:
    pool = pool_with(ref("a"), ref("b"), ref("c"), ref("d"))
    assert evicted(pool.place(ref("two", 2), 9.0)) == ["a", "b"]
    assert "c" in pool
    assert "d" in pool


def test_neighbours_leave_together_where_that_keeps_what_was_used_last() -> None:
    pool = pool_with(ref("a"), ref("b"), ref("c"), ref("d"))
    pool.start_running("a", 20.0)
    pool.stop_running("a", 20.0)
    # "a" and "b" lie side by side, as do "c" and "d": two units are had from one pair alone.
    assert evicted(pool.place(ref("two", 2), 21.0)) == ["c", "d"]


@pytest.mark.parametrize("need", ["running", "planned", "loading", "kept"])
def test_who_is_needed_stays(need: str) -> None:
    pool = AdapterPool(MIN, 4, MIN)
    pool.place(ref("a"), 0.0)
    if need != "loading":
        pool.loaded("a")
    if need == "running":
        pool.start_running("a", 1.0)
    if need == "planned":
        pool.plan("a", True)
    assert pool.place(ref("b"), 2.0, keep={"a"} if need == "kept" else ()) is None
    assert "a" in pool
    assert "b" not in pool


def test_a_request_may_drop_a_plan_pin_and_that_is_counted() -> None:
    pool = pool_with(ref("a"), ref("b"), units=2)
    pool.plan("a", True)
    assert evicted(pool.place(ref("c"), 5.0, drop_plan_pins=True)) == ["b"], "what is not pinned goes first"
    pool.loaded("c")
    pool.start_running("c", 6.0)
    assert evicted(pool.place(ref("d"), 7.0, drop_plan_pins=True)) == ["a"]
    assert pool.plan_pins_dropped == 1


def test_without_a_free_slot_one_leaves_though_memory_is_free() -> None:
    pool = pool_with(ref("a"), ref("b"), units=8, slots=2)
    placed = pool.place(ref("c"), 5.0)
    assert placed is not None
    assert [(e.adapter.version, e.slot) for e in placed.evicted] == [("a", placed.slot)]


def test_two_requests_pin_until_both_have_ended() -> None:
    pool = pool_with(ref("a"), units=1)
    assert pool.start_running("a", 1.0) == pool.start_running("a", 2.0)
    pool.stop_running("a", 3.0)
    assert pool.place(ref("b"), 4.0) is None
    pool.stop_running("a", 5.0)
    assert evicted(pool.place(ref("b"), 6.0)) == ["a"]


def test_refusals_name_the_setting_to_raise() -> None:
    refusal = AdapterPool(MIN * 5, 4, MIN).refusal(ref("big", 6))
    assert refusal is not None
    assert f"needs an extent of {8 * MIN} bytes" in refusal
    assert f"engine.pool_bytes={5 * MIN} can give is {4 * MIN}; raise engine.pool_bytes" in refusal
    assert AdapterPool(MIN, 0, MIN).refusal(ref("any")) == "engine.max_adapters is 0; raise it to serve adapters"
    assert AdapterPool(MIN * 5, 4, MIN).refusal(ref("fits", 4)) is None


def test_a_rank_above_the_limit_is_refused_by_name() -> None:
    adapter = ref("wide", 1)
    pool = AdapterPool(MIN * 4, 4, MIN, max_rank=adapter.rank - 1)
    refusal = pool.refusal(adapter)
    assert refusal == f"adapter name-wide has rank {adapter.rank}, engine.max_rank is {adapter.rank - 1}; raise it"
    assert AdapterPool(MIN * 4, 4, MIN, max_rank=adapter.rank).refusal(adapter) is None
