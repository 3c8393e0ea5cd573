"""The assignment of bins to engines."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.planner.placement.bins import assign_bins

MIB = float(1 << 20)


def test_bins_are_assigned_in_order_when_nothing_is_held() -> None:
    assert assign_bins(np.zeros((3, 3))).tolist() == [0, 1, 2]
    assert assign_bins(np.zeros((0, 0))).tolist() == []


def test_bins_go_where_most_of_their_bytes_are() -> None:
    kept = np.array([[0.0, 5.0, 1.0], [4.0, 6.0, 0.0], [0.0, 0.0, 2.0]]) * MIB
    assert assign_bins(kept).tolist() == [1, 0, 2]


def test_ties_keep_the_order() -> None:
    assert assign_bins(np.full((4, 4), 7 * MIB)).tolist() == [0, 1, 2, 3]


def squares(size: int) -> st.SearchStrategy[list[list[int]]]:
    row = st.lists(st.integers(0, 9), min_size=size, max_size=size)
    return st.lists(row, min_size=size, max_size=size)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 9), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_no_other_assignment_keeps_more_bytes(kept: list[list[int]]) -> None:
    matrix = np.array(kept) * MIB
    chosen = assign_bins(matrix)
    best = max(sum(matrix[i, e] for i, e in enumerate(order)) for order in itertools.permutations(range(len(kept))))
    assert sum(matrix[i, e] for i, e in enumerate(chosen)) == best
