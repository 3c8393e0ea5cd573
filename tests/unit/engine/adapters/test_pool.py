"""The pool: adapters in use stay, the cheapest choice is evicted, and nothing is evicted in vain."""

from itertools import combinations, pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraserve.engine.adapters.lifecycle import LifecycleEvent
from loraserve.engine.adapters.pool import AdapterPool, Placed
from loraserve.messages import AdapterRef

MIN = 16
UNITS = (1, 1, 2, 2, 3, 4, 6, 8)


def ref(version: str, units: int = 1, less_bytes: int = 0) -> AdapterRef:
    return AdapterRef(name=f"name-{version}", version=version, rank=8, slab_bytes=MIN * units - less_bytes)


def pool_with(*adapters: AdapterRef, units: int = 4, slots: int = 4) -> AdapterPool:
    """Return a pool with these adapters, placed and loaded one second apart."""
    pool = AdapterPool(MIN * units, slots, MIN)
    for now, adapter in enumerate(adapters):
        assert pool.place(adapter, float(now)) is not None
        pool.apply(adapter.version, LifecycleEvent.LOADED)
    return pool


def fail_load(pool: AdapterPool, version: str) -> None:
    pool.apply(version, LifecycleEvent.LOAD_FAILED)
    (removed,) = pool.remove_leaving()
    assert removed.adapter.version == version


def evicted(placed: Placed | None) -> list[str]:
    assert placed is not None
    return [entry.adapter.version for entry in placed.evicted]


class PoolMachine(RuleBasedStateMachine):
    """Compares the pool with a model that finds room and victims by trying every place and every run."""

    @initialize(units=st.integers(1, 16), slots=st.integers(1, 5))
    def begin(self, units: int, slots: int) -> None:
        self.units = units
        self.slots = slots
        self.pool = AdapterPool(MIN * units, slots, MIN)
        self.adapters = [ref(f"v{index}", size, index % 3) for index, size in enumerate(UNITS)]
        self.held: dict[str, tuple[int, int]] = {}
        self.loading: set[str] = set()
        self.running: dict[str, int] = {}
        self.planned: set[str] = set()
        self.leased: dict[str, int] = {}
        self.used_s: dict[str, float] = {}
        self.now = 0.0
        self.by_requests = False

    def evictable(self, version: str, drop_plan_pins: bool, leases_end: bool = False) -> bool:
        needed = version in self.loading or self.running.get(version, 0) > 0
        needed = needed or (not leases_end and self.leased.get(version, 0) > 0)
        return not needed and (drop_plan_pins or version not in self.planned)

    def room(self, size: int, staying: set[str]) -> bool:
        """Return whether ``size`` bytes and a slot would be free if only ``staying`` were left."""
        extents = [(self.held[v][0], self.held[v][0] + self.held[v][1]) for v in staying]
        places = range(0, MIN * self.units - size + 1, MIN)
        free = (all(end <= at or begin >= at + size for begin, end in extents) for at in places)
        return len(staying) < self.slots and any(free)

    def cheapest(self, size: int, may_go: set[str]) -> set[str]:
        """Return the cheapest run of removable neighbours that makes room."""
        by_address = sorted(self.held, key=lambda v: self.held[v][0])
        runs = [by_address[i:j] for i, j in combinations(range(len(by_address) + 1), 2)]
        enough = [run for run in runs if set(run) <= may_go and self.room(size, self.held.keys() - set(run))]
        return set(min(enough, key=self.cost))

    def cost(self, run: list[str]) -> tuple[float, ...]:
        bytes_of = {adapter.version: adapter.slab_bytes for adapter in self.adapters}
        last_used_s = max(self.used_s[v] for v in run)
        if self.by_requests:
            requests = sum(self.running.get(v, 0) for v in run)
            return requests, len(self.planned & set(run)), sum(bytes_of[v] for v in run), self.held[run[0]][0]
        return len(self.planned & set(run)), last_used_s, sum(bytes_of[v] for v in run), self.held[run[0]][0]

    @rule(index=st.integers(0, len(UNITS) - 1), drop=st.booleans(), keep=st.sets(st.sampled_from(["v0", "v2", "v4"])))
    def place(self, index: int, drop: bool, keep: set[str]) -> None:
        adapter = self.adapters[index]
        if adapter.version in self.pool:
            return
        self.now += 1.0
        size = -(-adapter.slab_bytes // MIN) * MIN
        may_go = {v for v in self.held if v not in keep and self.evictable(v, drop)}
        possible = self.room(size, self.held.keys() - may_go)
        expected = self.cheapest(size, may_go) if possible and not self.room(size, set(self.held)) else set()
        placed = self.pool.place(adapter, self.now, keep, drop)
        assert (placed is not None) == possible
        if placed is None:
            would = {v for v in self.held if v not in keep and self.evictable(v, drop, leases_end=True)}
            victims = self.cheapest(size, would) if self.room(size, self.held.keys() - would) else set()
            assert self.pool.eviction.find_leased_victims(adapter, keep, drop) == {
                v for v in victims if self.leased.get(v, 0)
            }
            return
        gone = set(evicted(placed))
        assert gone <= may_go, "something that is needed was evicted"
        assert all(not self.room(size, self.held.keys() - gone | {v}) for v in gone), "evicted in vain"
        assert gone == expected, "others would have cost less"
        self.planned -= gone
        for version in gone:
            del self.held[version]
        self.held[adapter.version] = (placed.offset_bytes, size)
        self.used_s[adapter.version] = self.now
        self.loading.add(adapter.version)

    @rule(index=st.integers(0, len(UNITS) - 1))
    def look_what_is_in_the_way(self, index: int) -> None:
        adapter = self.adapters[index]
        size = -(-adapter.slab_bytes // MIN) * MIN
        if adapter.version in self.held or size > MIN * self.units:
            return
        in_the_way = self.pool.eviction.find_blockers(adapter, 1)
        if self.room(size, {v for v in self.held if not self.evictable(v, drop_plan_pins=True)}):
            assert not in_the_way
            return
        self.by_requests = True
        assert in_the_way == self.cheapest(size, set(self.held))
        self.by_requests = False
        more = self.pool.eviction.find_blockers(adapter, 2)
        assert more >= in_the_way
        assert self.pool.eviction.find_blockers(adapter, 100) >= more

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), fails=st.booleans())
    def end_load(self, data: st.DataObject, fails: bool) -> None:
        version = data.draw(st.sampled_from(sorted(self.loading)))
        self.loading.remove(version)
        if fails:
            fail_load(self.pool, version)
            del self.held[version]
            self.planned.discard(version)
        else:
            self.pool.apply(version, LifecycleEvent.LOADED)

    @rule(data=st.data(), starts=st.booleans())
    def run(self, data: st.DataObject, starts: bool) -> None:
        ready = sorted(v for v in self.held if v not in self.loading and (starts or self.running.get(v, 0)))
        if ready:
            version = data.draw(st.sampled_from(ready))
            (self.pool.start_running if starts else self.pool.stop_running)(version, self.now)
            self.running[version] = self.running.get(version, 0) + (1 if starts else -1)
            self.used_s[version] = self.now

    @rule(data=st.data(), starts=st.booleans())
    def lease(self, data: st.DataObject, starts: bool) -> None:
        ready = sorted(v for v in self.held if v not in self.loading and (starts or self.leased.get(v, 0)))
        if ready:
            version = data.draw(st.sampled_from(ready))
            entry = self.pool.lease(version) if starts else self.pool.get(version)
            assert entry is not None
            if not starts:
                self.pool.end_lease(version, entry.generation)
            self.leased[version] = self.leased.get(version, 0) + (1 if starts else -1)

    @rule(index=st.integers(0, len(UNITS) - 1), wanted=st.booleans())
    def plan(self, index: int, wanted: bool) -> None:
        version = f"v{index}"
        changes = version in self.held and (version in self.planned) != wanted
        assert self.pool.pin_for_plan(version, 1 if wanted else None) == changes
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
        assert self.pool.eviction.free_bytes == MIN * self.units - needed
        staying = {v for v in self.held if not self.evictable(v, drop_plan_pins=True)}
        sizes = range(MIN, MIN * self.units + 1, MIN)
        assert self.pool.eviction.room_bytes == max((s for s in sizes if self.room(s, staying)), default=0)
        extents = sorted((start, start + size) for start, size in self.held.values())
        assert all(before[1] <= after[0] for before, after in pairwise(extents))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def test_the_least_recently_used_adapter_is_evicted_first() -> None:
    pool = pool_with(ref("a"), ref("b"), ref("c"), ref("d"))
    pool.start_running("a", 10.0)
    pool.stop_running("a", 11.0)
    assert evicted(pool.place(ref("e"), 12.0)) == ["b"]
    assert evicted(pool.place(ref("f"), 13.0)) == ["c"]


def test_no_more_adapters_are_evicted_than_needed() -> None:
    pool = pool_with(ref("a"), ref("b"), ref("c"), ref("d"))
    assert evicted(pool.place(ref("two", 2), 9.0)) == ["a", "b"]
    assert "c" in pool
    assert "d" in pool


def test_neighbours_are_evicted_together_to_keep_a_recently_used_adapter() -> None:
    pool = pool_with(ref("a"), ref("b"), ref("c"), ref("d"))
    pool.start_running("b", 20.0)
    pool.stop_running("b", 20.0)
    # "a" has been unused for longest, but its only neighbour is "b".
    assert evicted(pool.place(ref("two", 2), 21.0)) == ["c", "d"]


def test_neighbours_are_evicted_together_anywhere_in_the_pool() -> None:
    pool = pool_with(ref("a"), ref("b"), ref("c"), ref("d"))
    pool.start_running("a", 20.0)
    pool.stop_running("a", 20.0)
    assert evicted(pool.place(ref("two", 2), 21.0)) == ["b", "c"]


@pytest.mark.parametrize("hole", ["a", "c"])
def test_a_hole_on_either_side_of_a_victim_counts_as_room(hole: str) -> None:
    pool = AdapterPool(MIN * 3, 4, MIN)
    for adapter in (ref("a"), ref("b"), ref("c")):
        pool.place(adapter, 0.0)
    fail_load(pool, hole)
    pool.apply("b", LifecycleEvent.LOADED)
    assert evicted(pool.place(ref("two", 2), 1.0)) == ["b"]


def test_evicting_one_plan_pin_is_cheaper_than_two_older_ones() -> None:
    pool = pool_with(ref("a"), ref("b"), ref("c", 2))
    for version in "abc":
        pool.pin_for_plan(version, 1)
    assert evicted(pool.place(ref("two", 2), 9.0, drop_plan_pins=True)) == ["c"]


@pytest.mark.parametrize(("units", "goes"), [((3, 2, 2), "b"), ((2, 2, 3), "a")])
def test_ties_are_broken_by_least_bytes_then_by_lowest_offset(units: tuple[int, ...], goes: str) -> None:
    pool = AdapterPool(MIN * sum(units), 4, MIN)
    for version, size in zip("abc", units, strict=True):
        pool.place(ref(version, size), 0.0)
        pool.apply(version, LifecycleEvent.LOADED)
    assert evicted(pool.place(ref("two", 2), 1.0)) == [goes]


@pytest.mark.parametrize("need", ["running", "planned", "loading", "leased", "kept"])
def test_an_adapter_in_use_is_not_evicted(need: str) -> None:
    pool = AdapterPool(MIN, 4, MIN)
    pool.place(ref("a"), 0.0)
    if need != "loading":
        pool.apply("a", LifecycleEvent.LOADED)
    if need == "running":
        pool.start_running("a", 1.0)
    if need == "planned":
        pool.pin_for_plan("a", 1)
    if need == "leased":
        pool.lease("a")
    assert pool.place(ref("b"), 2.0, keep={"a"} if need == "kept" else ()) is None
    assert "a" in pool
    assert "b" not in pool


def test_a_request_may_drop_a_plan_pin_where_nothing_else_makes_room() -> None:
    pool = pool_with(ref("a"), ref("b"), units=2)
    pool.pin_for_plan("a", 1)
    assert evicted(pool.place(ref("c"), 5.0, drop_plan_pins=True)) == ["b"], "what is not pinned goes first"
    pool.apply("c", LifecycleEvent.LOADED)
    pool.start_running("c", 6.0)
    placed = pool.place(ref("d"), 7.0, drop_plan_pins=True)
    assert evicted(placed) == ["a"]
    assert placed is not None
    assert [entry.planned for entry in placed.evicted] == [True]


def test_without_a_free_slot_an_adapter_is_evicted_though_memory_is_free() -> None:
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
    refusal = AdapterPool(MIN * 5 + 3, 4, MIN).refusal(ref("big", 6, 1))
    assert refusal is not None
    assert f"needs an extent of {6 * MIN} bytes" in refusal
    assert f"engine.pool_bytes={5 * MIN + 3} can give is {5 * MIN}; raise engine.pool_bytes" in refusal
    assert AdapterPool(MIN, 0, MIN).refusal(ref("any")) == "engine.max_adapters is 0; raise it to serve adapters"
    assert AdapterPool(MIN * 5, 4, MIN).refusal(ref("fits", 5)) is None
    assert AdapterPool(MIN * 5, 4, MIN).refusal(ref("none", 0)) == "adapter name-none has 0 bytes; register it again"


def test_a_rank_above_the_limit_is_refused_by_name() -> None:
    adapter = ref("wide", 1)
    pool = AdapterPool(MIN * 4, 4, MIN, max_rank=adapter.rank - 1)
    refusal = pool.refusal(adapter)
    assert refusal == f"adapter name-wide has rank {adapter.rank}, engine.max_rank is {adapter.rank - 1}; raise it"
    assert AdapterPool(MIN * 4, 4, MIN, max_rank=adapter.rank).refusal(adapter) is None
