"""Extents are disjoint and as tight as granules allow, and holes merge when extents are released."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraserve.engine.adapters.pool import ExtentAllocator

MIN = 16


def rounded(wanted: int) -> int:
    return next(size for size in range(MIN, wanted + 2 * MIN, MIN) if size >= wanted)


class ExtentMachine(RuleBasedStateMachine):
    """Compares the allocator with a model that knows the owner of each granule."""

    @initialize(region=st.integers(0, 1000))
    def begin(self, region: int) -> None:
        self.region = region // MIN * MIN
        self.extents = ExtentAllocator(region, MIN)
        self.used: dict[int, int] = {}

    def holes(self) -> list[tuple[int, int]]:
        """Return sizes by first byte."""
        free = set(range(0, self.region, MIN))
        for start, size in self.used.items():
            free -= set(range(start, start + size, MIN))
        edges = [at for at in sorted(free) if at - MIN not in free]
        return [(next(n for n in range(MIN, 1016, MIN) if at + n not in free), at) for at in edges]

    @rule(wanted=st.integers(1, 600))
    def allocate(self, wanted: int) -> None:
        size = rounded(wanted)
        fitting = [hole for hole in self.holes() if hole[0] >= size]
        assert self.extents.extent_bytes(wanted) == size
        assert self.extents.fits(wanted) == bool(fitting)
        start = self.extents.allocate(wanted)
        assert start == (min(fitting)[1] if fitting else None), "not the lowest of the tightest holes"
        if start is not None:
            self.used[start] = size

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        start = data.draw(st.sampled_from(sorted(self.used)))
        del self.used[start]
        self.extents.release(start)

    @rule(first=st.integers(0, 1000), length=st.integers(1, 300))
    def look(self, first: int, length: int) -> None:
        expected = [start for start, size in self.used.items() if start < first + length and start + size > first]
        assert sorted(self.extents.used_in(first, first + length)) == sorted(expected)

    @rule(wanted=st.integers(1, 600), data=st.data())
    def make_room(self, wanted: int, data: st.DataObject) -> None:
        """Compare the smallest runs whose release makes room with those found by trying all runs."""
        may_go = data.draw(st.sets(st.sampled_from(sorted(self.used))) if self.used else st.just(set()))
        if self.extents.fits(wanted):
            return
        edges = [0, *sorted(self.used), self.region]
        ends = {start: start + size for start, size in self.used.items()}
        enough = set()
        for i in range(1, len(edges) - 1):
            for j in range(i, len(edges) - 1):
                left = ends[edges[i - 1]] if i > 1 else 0
                if set(edges[i : j + 1]) <= may_go and edges[j + 1] - left >= rounded(wanted):
                    enough.add(tuple(edges[i : j + 1]))
        found = [tuple(run) for run in self.extents.runs(wanted, may_go)]
        assert found == sorted(run for run in enough if not {run[1:], run[:-1]} & enough)

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "extents"):
            self.extents.validate()
            assert self.extents.free_bytes == self.region - sum(self.used.values())
            assert self.extents.largest_bytes == self.region

    def teardown(self) -> None:
        """Release everything: the whole region can be allocated."""
        if not hasattr(self, "extents"):
            return
        for start in list(self.used):
            self.extents.release(start)
        assert self.extents.free_bytes == self.region
        assert self.extents.allocate(self.region) == (0 if self.region else None)
        assert self.extents.free_bytes == 0


TestExtents = ExtentMachine.TestCase
TestExtents.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def filled(*units: int, spare: int = 0) -> tuple[ExtentAllocator, list[int]]:
    """Return an allocator with adjacent extents of so many granules, and their offsets."""
    extents = ExtentAllocator((sum(units) + spare) * MIN, MIN)
    starts = [extents.allocate(count * MIN) for count in units]
    assert starts == [sum(units[:index]) * MIN for index in range(len(units))]
    return extents, [start for start in starts if start is not None]


def test_the_lowest_of_the_tightest_holes_is_taken() -> None:
    extents, starts = filled(3, 1, 2, 1, 2, 1, spare=4)
    for index in (0, 2, 4):
        extents.release(starts[index])
    assert extents.allocate(2 * MIN) == starts[2], "as tight as the next one, and lower"
    assert extents.allocate(2 * MIN) == starts[4], "tighter than the first hole"
    assert [extents.allocate(MIN) for _ in range(3)] == [0, MIN, 2 * MIN], "its rest is the tightest again"


def test_an_extent_is_no_larger_than_the_granules_that_it_needs() -> None:
    extents = ExtentAllocator(11 * MIN, MIN)
    assert [extents.allocate(5 * MIN), extents.allocate(4 * MIN + 1)] == [0, 5 * MIN]
    assert extents.free_bytes == MIN


def test_a_released_extent_merges_with_the_holes_on_both_sides() -> None:
    extents, starts = filled(2, 3, 2)
    for index in (0, 2, 1):
        assert not extents.fits(6 * MIN)
        extents.release(starts[index])
    assert extents.allocate(7 * MIN) == 0


def test_a_region_is_used_to_its_last_whole_granule() -> None:
    extents = ExtentAllocator(7 * MIN + 5, MIN)
    assert extents.largest_bytes == 7 * MIN
    assert sorted(extents.allocate(MIN) or 0 for _ in range(7)) == [index * MIN for index in range(7)]
    assert extents.allocate(1) is None


def test_a_region_smaller_than_an_extent_gives_nothing() -> None:
    extents = ExtentAllocator(MIN - 1, MIN)
    assert (extents.largest_bytes, extents.free_bytes, extents.allocate(1)) == (0, 0, None)
    assert list(extents.runs(1, set())) == []
    extents.validate()


@given(units=st.lists(st.integers(1, 4), min_size=1, max_size=6), spare=st.integers(0, 3), data=st.data())
def test_releasing_a_run_makes_the_room_that_was_asked_for(units: list[int], spare: int, data: st.DataObject) -> None:
    extents, starts = filled(*units, spare=spare)
    wanted = data.draw(st.integers(spare * MIN + 1, (sum(units) + spare) * MIN))
    run = data.draw(st.sampled_from(list(extents.runs(wanted, set(starts)))))
    for start in run:
        assert not extents.fits(wanted), "it had a member to spare"
        extents.release(start)
    assert extents.allocate(wanted) is not None


def test_an_extent_that_is_not_allocated_cannot_be_released() -> None:
    extents = ExtentAllocator(4 * MIN, MIN)
    extents.allocate(MIN)
    extents.release(0)
    with pytest.raises(KeyError):
        extents.release(0)
