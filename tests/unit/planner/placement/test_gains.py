"""What moves are said to be worth, and why they are made."""

from collections.abc import Iterator

import msgspec
import pytest

from loraserve.cost import CostModel
from loraserve.messages import AdapterDemand, AdapterRef, Placement
from loraserve.planner.placement.moves import Outlook, diff, outlook
from loraserve.planner.placement.ours import plan
from loraserve.planner.placement.problem import PlanSettings
from loraserve.planner.placement.utilisation import predicted_ttft_s
from loraserve.testing.reports import MIB, adapter_ref, asked_for, engine_load

PADDED = CostModel(lora="padded", step_base_s=0.0, padded_decode_s=2e-5, padded_prefill_s=1.6e-5)
EXACT = CostModel()


def refs_of(ranks: list[int]) -> dict[str, AdapterRef]:
    return {ref.version: ref for ref in (adapter_ref(n, rank=rank) for n, rank in enumerate(ranks))}


def outlook_of(
    refs: dict[str, AdapterRef], rate: float, cost: CostModel, settings: PlanSettings | None = None, idle: int = 0
) -> Outlook:
    """The first so many nobody asks for; engines e0 to e3."""
    demand = [asked_for(ref, rate, rate) for ref in list(refs.values())[idle:]]
    engines = [engine_load(f"e{n}") for n in range(4)]
    return outlook(demand, refs, engines, cost, settings or PlanSettings())


def copies(*places: tuple[int, str], share: float = 1.0) -> tuple[Placement, ...]:
    return tuple(Placement(version=f"v{n}", name=f"adapter-{n}", engine=e, share=share) for n, e in places)


def ttft_s(expected: Outlook, placements: tuple[Placement, ...]) -> float:
    return predicted_ttft_s(expected.problem, expected._pieces(placements))


@pytest.mark.parametrize("cost", [PADDED, EXACT], ids=["padded", "exact"])
def test_the_gain_of_the_only_move_is_what_the_plan_gains(cost: CostModel) -> None:
    refs = refs_of([8, 128, 8, 64])
    expected = outlook_of(refs, 30.0, cost)
    before = copies((0, "e0"), (1, "e0"), (2, "e0"), (3, "e1"))
    for after in (
        copies((0, "e0"), (1, "e2"), (2, "e0"), (3, "e1")),
        copies((0, "e0"), (1, "e1"), (2, "e0"), (3, "e1")),
        copies((0, "e1"), (1, "e0"), (2, "e0"), (3, "e1")),
    ):
        (move,) = diff(before, after, refs, expected)
        assert move.gain_s == pytest.approx(ttft_s(expected, before) - ttft_s(expected, after), abs=1e-9)
        assert move.gain_s != 0


def test_the_gain_of_a_second_copy_is_that_of_its_share() -> None:
    refs = refs_of([8, 8])
    expected = outlook_of(refs, 60.0, EXACT)
    before = copies((0, "e0"), (1, "e0"))
    after = copies((0, "e0"), (0, "e1"), share=0.5) + copies((1, "e0"))
    (move,) = diff(before, after, refs, expected)
    # Splitting reads the slab on two engines; a gain undone one by one has it only once, a ten-thousandth here.
    assert move.gain_s == pytest.approx(ttft_s(expected, before) - ttft_s(expected, after), rel=0.02)
    (back,) = diff(after, before, refs, expected)
    assert back.gain_s == pytest.approx(-move.gain_s, rel=0.02)


def test_a_first_copy_saves_the_load_that_each_request_would_wait_for() -> None:
    refs = refs_of([8, 8])
    expected = outlook_of(refs, 5.0, EXACT)
    (move,) = diff(copies((0, "e0")), copies((0, "e0"), (1, "e1")), refs, expected)
    assert move.gain_s == pytest.approx((EXACT.load_base_s + MIB * EXACT.load_byte_s) / 2)
    assert move.reason == "asked for and planned nowhere yet"


def test_what_nobody_asks_for_gains_nothing() -> None:
    refs = refs_of([8, 8])
    expected = outlook_of(refs, 5.0, EXACT, idle=1)
    moves = diff(copies((1, "e0")), copies((0, "e1"), (1, "e0")), refs, expected)
    assert [(m.gain_s, m.reason) for m in moves] == [(0.0, "registered and planned nowhere yet")]


def test_a_copy_that_only_goes_keeps_its_reason() -> None:
    refs = refs_of([8, 8])
    expected = outlook_of(refs, 5.0, EXACT)
    both = copies((0, "e0"), (0, "e1"), share=0.5)
    (move,) = diff(both + copies((1, "e0")), copies((0, "e1"), (1, "e0")), refs, expected)
    assert move.reason == "demand fits fewer copies"
    (gone,) = diff(copies((9, "e0")), (), refs, expected)
    assert (gone.gain_s, gone.reason) == (0.0, "the adapter is no longer registered")


def test_reasons_say_what_slows_whom() -> None:
    refs = refs_of([8, 128, 8])
    expected = outlook_of(refs, 10.0, PADDED)
    mixed = copies((0, "e0"), (1, "e0"), (2, "e1"))
    (high,) = diff(mixed, copies((0, "e0"), (1, "e2"), (2, "e1")), refs, expected)
    assert high.reason == "its rank 128 slows others on e0, of rank 8 at most"
    (low,) = diff(mixed, copies((0, "e1"), (1, "e0"), (2, "e1")), refs, expected)
    assert low.reason == "rank 128 on e0 slows it, rank 8"
    assert high.gain_s > 0
    assert low.gain_s > 0


def test_reasons_say_how_busy_engines_would_be() -> None:
    refs = refs_of([8, 8, 8])
    expected = outlook_of(refs, 50.0, EXACT)
    (move,) = diff(copies((0, "e0"), (1, "e0"), (2, "e1")), copies((0, "e0"), (1, "e2"), (2, "e1")), refs, expected)
    assert move.reason.startswith("e0 would be ")
    assert move.reason.endswith("% busy, e2 0%")


def test_reasons_name_pins_drains_and_engines_that_are_gone() -> None:
    refs = refs_of([8, 8, 8])
    settings = PlanSettings(pins={"adapter-0": ("e1",)}, drained=frozenset({"e3"}))
    expected = outlook_of(refs, 5.0, EXACT, settings)
    before = copies((0, "e0"), (1, "e3"), (2, "lost"))
    reasons = [m.reason for m in diff(before, copies((0, "e1"), (1, "e0"), (2, "e2")), refs, expected)]
    assert reasons == ["it is pinned to e1", "e3 is being drained", "lost is gone"]


def test_a_least_number_of_copies_and_heat_are_reasons_for_more() -> None:
    refs = refs_of([8, 8])
    more = copies((0, "e0"), (0, "e1"), share=0.5) + copies((1, "e0"))
    (kept,) = diff(copies((0, "e0"), (1, "e0")), more, refs, outlook_of(refs, 5.0, EXACT, PlanSettings(min_copies=2)))
    assert kept.reason == "there are to be 2 copies at least"
    (hot,) = diff(copies((0, "e0"), (1, "e0")), more, refs, outlook_of(refs, 50.0, EXACT))
    assert hot.reason.startswith("demand takes ")


def test_every_move_of_a_plan_has_a_reason_and_those_that_part_ranks_a_gain() -> None:
    refs = refs_of([8, 128] * 12)
    engines = [engine_load(f"e{n}") for n in range(4)]
    demand = [asked_for(ref, 10.0, 10.0) for ref in refs.values()]
    before = copies(*((n, f"e{n // 2 % 4}") for n in range(24)))
    settings = PlanSettings()
    after = plan(demand, refs, engines, before, PADDED, settings)
    moves = diff(before, after, refs, outlook(demand, refs, engines, PADDED, settings))
    plain = diff(before, after, refs)
    assert [msgspec.structs.replace(m, reason="", gain_s=0.0) for m in moves] == [
        msgspec.structs.replace(m, reason="") for m in plain
    ]
    assert all(m.reason for m in moves)
    assert sum(m.gain_s > 0 for m in moves) >= len(moves) / 2


def test_nothing_is_reckoned_where_nothing_moves() -> None:
    class Unread(list[AdapterDemand]):
        def __iter__(self) -> Iterator[AdapterDemand]:
            raise AssertionError("the demand was looked at")

    refs = refs_of([8, 128])
    expected = outlook(Unread(), refs, [engine_load("e0"), engine_load("e1")], EXACT, PlanSettings())
    placements = copies((0, "e0"), (1, "e1"))
    assert diff(placements, placements, refs, expected) == []
    with pytest.raises(AssertionError, match="was looked at"):
        diff(placements, copies((0, "e1"), (1, "e1")), refs, expected)
