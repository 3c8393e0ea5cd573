"""Extents: disjoint, aligned, as tight as powers of two allow, and whole again once they are given back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraserve.engine.buddy import BuddyAllocator

MIN = 16


def arenas(region: int) -> list[tuple[int, int]]:
    """The region as its binary digits: the largest power of two first. What is smaller than MIN is left out."""
    sizes = [1 << bit for bit in range(region.bit_length(), -1, -1) if region >> bit & 1 and 1 << bit >= MIN]
    return [(sum(sizes[:index]), size) for index, size in enumerate(sizes)]


def windows(region: int, size: int) -> list[tuple[int, int]]:
    """Every place where an extent of this size may lie."""
    return [(at, at + size) for start, length in arenas(region) for at in range(start, start + length, size)]


class BuddyMachine(RuleBasedStateMachine):
    @initialize(region=st.integers(0, 1000))
    def begin(self, region: int) -> None:
        self.region = region
        self.buddy = BuddyAllocator(region, MIN)
        self.used: dict[int, int] = {}

    def is_free(self, first: int, end: int) -> bool:
        return all(end <= start or start + size <= first for start, size in self.used.items())

    @rule(wanted=st.integers(1, 600))
    def allocate(self, wanted: int) -> None:
        size = max(MIN, 1 << (wanted - 1).bit_length())
        possible = [
            first for first, end in windows(self.region, size) if end <= self.region and self.is_free(first, end)
        ]
        start = self.buddy.allocate(wanted)
        assert (start is None) == (not possible), "room was not seen, or was invented"
        assert self.buddy.extent_bytes(wanted) == size
        if start is not None:
            assert start in possible, "the extent overlaps another, is unaligned or leaves its arena"
            self.used[start] = size

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        start = data.draw(st.sampled_from(sorted(self.used)))
        del self.used[start]
        self.buddy.release(start)

    @rule(first=st.integers(0, 1000), length=st.integers(1, 300))
    def look(self, first: int, length: int) -> None:
        expected = [start for start, size in self.used.items() if start < first + length and start + size > first]
        assert sorted(self.buddy.used_in(first, first + length)) == sorted(expected)

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "buddy"):
            self.buddy.validate()
            total = sum(size for _, size in arenas(self.region))
            assert self.buddy.free_bytes == total - sum(self.used.values())

    def teardown(self) -> None:
        """All given back, every arena can be had whole."""
        if not hasattr(self, "buddy"):
            return
        for start in list(self.used):
            self.buddy.release(start)
        for _, size in arenas(self.region):
            assert self.buddy.allocate(size) is not None
        assert self.buddy.free_bytes == 0


TestBuddy = BuddyMachine.TestCase
TestBuddy.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_the_lowest_of_the_tightest_fit_is_taken() -> None:
    buddy = BuddyAllocator(8 * MIN, MIN)
    first, second, third = (buddy.allocate(MIN) for _ in range(3))
    assert (first, second, third) == (0, MIN, 2 * MIN)
    buddy.release(0)
    # One MIN is free at 0 and one at 3 * MIN, before the half that is whole.
    assert [buddy.allocate(1) for _ in range(2)] == [0, 3 * MIN]
    assert buddy.allocate(4 * MIN) == 4 * MIN


def test_a_region_that_is_no_power_of_two_is_used_to_its_last_whole_extent() -> None:
    buddy = BuddyAllocator(7 * MIN + 5, MIN)
    assert buddy.largest_bytes == 4 * MIN
    assert sorted(buddy.allocate(MIN) or 0 for _ in range(7)) == [index * MIN for index in range(7)]
    assert buddy.allocate(1) is None


def test_a_region_smaller_than_an_extent_gives_nothing() -> None:
    buddy = BuddyAllocator(MIN - 1, MIN)
    assert (buddy.largest_bytes, buddy.free_bytes, buddy.allocate(1)) == (0, 0, None)
    buddy.validate()


@given(region=st.integers(MIN, 1000), wanted=st.integers(1, 1200), data=st.data())
def test_a_window_is_where_an_extent_of_that_size_could_lie(region: int, wanted: int, data: st.DataObject) -> None:
    buddy = BuddyAllocator(region, MIN)
    arena_start, arena_bytes = data.draw(st.sampled_from(arenas(region)))
    start = data.draw(st.integers(arena_start, arena_start + arena_bytes - 1))
    size = buddy.extent_bytes(wanted)
    expected = (
        [(first, end) for first, end in windows(region, size) if first <= start < end] if size <= arena_bytes else []
    )
    assert buddy.window(start, wanted) == (expected[0] if expected else None)


def test_what_is_not_given_out_cannot_be_given_back() -> None:
    buddy = BuddyAllocator(4 * MIN, MIN)
    buddy.allocate(MIN)
    buddy.release(0)
    with pytest.raises(KeyError):
        buddy.release(0)
