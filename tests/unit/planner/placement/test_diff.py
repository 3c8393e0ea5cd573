"""What changes between two plans."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.messages import Move, Placement
from loraserve.planner.placement.moves import diff
from loraserve.testing.reports import MIB, adapter_ref

ADAPTERS = {ref.version: ref for ref in (adapter_ref(n, slab_bytes=(n + 1) * MIB) for n in range(3))}


def copies(*places: tuple[int, str]) -> tuple[Placement, ...]:
    return tuple(Placement(version=f"v{n}", name=f"adapter-{n}", engine=e, share=1.0) for n, e in places)


def only(moves: list[Move]) -> Move:
    (move,) = moves
    return move


def test_the_same_copies_are_no_moves_whatever_their_order_and_shares() -> None:
    plan = copies((0, "e0"), (0, "e1"), (1, "e0"))
    other = tuple(Placement(version=p.version, name=p.name, engine=p.engine, share=0.5) for p in reversed(plan))
    assert diff(plan, other, ADAPTERS) == []


def test_a_copy_that_appears_says_what_it_loads_and_why() -> None:
    move = only(diff((), copies((2, "e0")), ADAPTERS))
    assert (move.name, move.source, move.target, move.slab_bytes) == ("adapter-2", "", "e0", 3 * MIB)
    assert move.reason == "asked for and planned nowhere yet"


def test_a_further_copy_has_another_reason() -> None:
    move = only(diff(copies((0, "e0")), copies((0, "e0"), (0, "e1")), ADAPTERS))
    assert (move.target, move.reason) == ("e1", "demand is more than one engine's share")


def test_a_copy_that_goes_loads_nothing_and_says_why() -> None:
    move = only(diff(copies((0, "e0"), (0, "e1")), copies((0, "e0")), ADAPTERS))
    assert (move.source, move.target, move.slab_bytes) == ("e1", "", 0)
    assert move.reason == "demand fits fewer copies"


def test_a_copy_of_an_unregistered_adapter_goes_for_that_reason() -> None:
    move = only(diff(copies((9, "e0")), (), ADAPTERS))
    assert (move.name, move.source, move.target) == ("adapter-9", "e0", "")
    assert move.reason == "the adapter is no longer registered"


def test_one_that_appears_and_one_that_goes_are_one_move() -> None:
    move = only(diff(copies((0, "e0"), (0, "e1")), copies((0, "e1"), (0, "e2")), ADAPTERS))
    assert (move.source, move.target, move.slab_bytes) == ("e0", "e2", MIB)
    assert move.reason == "e2 carries less than e0"


def test_adapters_are_never_paired_with_each_other() -> None:
    moves = diff(copies((0, "e0")), copies((1, "e0")), ADAPTERS)
    assert [(m.version, m.source, m.target) for m in moves] == [("v0", "e0", ""), ("v1", "", "e0")]


places = st.sets(st.tuples(st.integers(0, 3), st.sampled_from(["e0", "e1", "e2"])), max_size=10)


@settings(max_examples=150, deadline=None)
@given(places, places)
def test_the_moves_lead_from_one_plan_to_the_other_with_nothing_to_spare(before, after) -> None:
    moves = diff(copies(*before), copies(*after), ADAPTERS)
    reached = {(f"v{n}", e) for n, e in before}
    for move in moves:
        if move.source:
            reached.remove((move.version, move.source))
        if move.target:
            assert (move.version, move.target) not in reached
            reached.add((move.version, move.target))
    assert reached == {(f"v{n}", e) for n, e in after}
    gone, new = (Counter(n for n, _ in one - other) for one, other in ((before, after), (after, before)))
    assert len(moves) == sum(max(gone[n], new[n]) for n in gone | new)
    assert moves == diff(copies(*sorted(before)), copies(*sorted(after)), ADAPTERS)
    assert all(m.reason and (m.slab_bytes > 0) == bool(m.target and m.version in ADAPTERS) for m in moves)
