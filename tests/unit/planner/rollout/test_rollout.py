"""One plan after another, and what goes wrong in each phase."""

import re
from collections.abc import Iterable
from typing import Any

import pytest

from loraserve.messages import EngineLoad, Placement, Plan
from loraserve.planner.rollout import machine
from loraserve.planner.rollout.events import (
    Begin,
    Cancel,
    EnginesSeen,
    Event,
    Instruction,
    Prepare,
    PrepareAnswered,
    PrepareFailed,
    Publish,
    Replan,
    Retire,
    RetireEnded,
    RolloutEnded,
    Write,
    WriteFailed,
    Written,
)
from loraserve.planner.rollout.machine import RETRY_S, TRANSITIONS, Phase, Rollout, Trigger
from loraserve.testing.reports import adapter_ref, engine_load, resident

A, B, C = (adapter_ref(n) for n in range(3))
ADAPTERS = {a.version: a for a in (A, B, C)}
BOTH = (engine_load("e0"), engine_load("e1"))


def copies(*pairs: tuple[str, Any]) -> tuple[Placement, ...]:
    """Copies by (engine, adapter), with equal shares."""
    count = {adapter.version: sum(a is adapter for _, a in pairs) for _, adapter in pairs}
    return tuple(Placement(version=a.version, name=a.name, engine=e, share=1 / count[a.version]) for e, a in pairs)


def plan(epoch: int, *pairs: tuple[str, Any], drained: tuple[str, ...] = ()) -> Plan:
    return Plan(epoch=epoch, created_unix_s=1.0, placements=copies(*pairs), drained=drained)


def holding(engine: str, *adapters: Any, **changes: Any) -> EngineLoad:
    return engine_load(engine, resident=tuple(resident(a, pinned=True) for a in adapters), **changes)


class Desk:
    """A roll-out that is validated after each event; its time is turned by hand."""

    def __init__(self, before: Plan | None = None, engines: Iterable[EngineLoad] = BOTH) -> None:
        self.rollout = Rollout(before or plan(0))
        self.now = 100.0
        self.see(*engines)

    def tell(self, event: Event) -> list[Instruction]:
        instructions = self.rollout.handle(event, self.now)
        self.rollout.validate()
        return instructions

    def see(self, *engines: EngineLoad) -> list[Instruction]:
        return self.tell(EnginesSeen(engines, ADAPTERS))

    def begin(self, *pairs: tuple[str, Any], drained: Iterable[str] = ()) -> list[Instruction]:
        return self.tell(Begin(copies(*pairs), ADAPTERS, frozenset(drained), 1.0))

    def answer(self, engine: str, epoch: int, **failed: str) -> list[Instruction]:
        return self.tell(PrepareAnswered(engine, "i1", epoch, failed))

    def write(self, instructions: list[Instruction]) -> list[Instruction]:
        (write,) = instructions
        assert isinstance(write, Write)
        return self.tell(Written(write.plan.epoch))


def test_the_diagram_shows_the_transition_table() -> None:
    assert machine.__doc__ is not None
    lines = re.findall(r"^    (\w+) +--(\w+)--> +(\w+)", machine.__doc__, re.M)
    assert {(Phase(before), Trigger(trigger)): Phase(after) for before, trigger, after in lines} == TRANSITIONS
    assert len(lines) == len(TRANSITIONS)


def test_a_plan_may_not_begin_while_another_is_written() -> None:
    desk = Desk()
    desk.begin(("e0", A))
    desk.answer("e0", 1)
    assert desk.rollout.phase is Phase.WRITING
    with pytest.raises(AssertionError, match="while the plan of the last is being written"):
        desk.begin(("e0", B))


def test_while_a_plan_is_written_engines_are_held_to_neither_plan() -> None:
    desk = Desk(plan(4, ("e0", A)), (holding("e0", A), holding("e1")))
    desk.begin(("e1", B))
    (write,) = desk.answer("e1", 5)
    assert desk.see(holding("e0", A), holding("e1", B, plan_epoch=5)) == []
    assert desk.see(holding("e0", A), engine_load("e1", incarnation="i2")) == []
    assert desk.tell(Cancel()) == []
    assert desk.write([write]) == [Publish(plan(5, ("e1", B))), *retires(5, e0=(), e1=("v1",))]
    desk.tell(RetireEnded("e0", 5))
    desk.tell(RetireEnded("e1", 5))
    restarted = engine_load("e1", incarnation="i2")
    assert desk.see(holding("e0"), restarted) == [Prepare("e1", 5, (B,))], "it restarted after it had prepared"


def test_the_story_of_an_adapter_says_where_its_copies_went() -> None:
    desk = Desk(plan(4, ("e0", A)))
    desk.begin(("e1", A))
    desk.write(desk.answer("e1", 5))
    assert desk.rollout.story.lines("v0") == ["100.000 plan epoch 5: copies on e1 (100% of its requests)"]


def test_copies_are_prepared_then_written_then_published_then_the_rest_retired() -> None:
    desk = Desk(plan(4, ("e0", A), ("e1", B)), (holding("e0", A), holding("e1", B)))
    assert desk.begin(("e1", A), ("e1", B)) == [Prepare("e1", 5, (A, B))]
    (write,) = written = desk.answer("e1", 5)
    assert write == Write(plan(5, ("e1", A), ("e1", B)))
    assert desk.rollout.plan.epoch == 4, "what is not written is not in force"
    new = plan(5, ("e1", A), ("e1", B))
    assert desk.write(written) == [Publish(new), Retire("e0", 5, ()), Retire("e1", 5, ("v0", "v1"))]
    assert desk.tell(RetireEnded("e0", 5)) == []
    assert desk.tell(RetireEnded("e1", 5)) == [RolloutEnded(5, True, ())]
    assert (desk.rollout.plan, desk.rollout.phase) == (new, Phase.IDLE)
    assert desk.rollout.story.entries("epoch-5")[-1].what == "in force"


def test_a_plan_of_nothing_is_written_at_once() -> None:
    desk = Desk(plan(4, ("e0", A)))
    assert desk.write(desk.begin()) == [Publish(plan(5)), Retire("e0", 5, ()), Retire("e1", 5, ())]


def test_a_move_whose_target_failed_is_not_made() -> None:
    desk = Desk(plan(4, ("e0", A), ("e0", B)))
    desk.begin(("e1", A), ("e1", B))
    (write,) = desk.answer("e1", 5, v0="corrupt")
    assert write == Write(plan(5, ("e0", A), ("e1", B)))
    assert Retire("e0", 5, ("v0",)) in desk.write([write])


def test_as_many_old_copies_stay_as_new_ones_failed_and_drained_ones_last() -> None:
    desk = Desk(plan(4, ("e0", A), ("e1", A)), [*BOTH, engine_load("e2")])
    desk.begin(("e2", A), drained=["e0"])
    (write,) = desk.answer("e2", 5, v0="corrupt")
    assert write == Write(plan(5, ("e1", A), drained=("e0",)))


def test_unequal_shares_keep_their_proportion_where_a_copy_is_left_out() -> None:
    desk = Desk(engines=[*BOTH, engine_load("e2")])
    shares = {"e0": 0.6, "e1": 0.2, "e2": 0.2}
    wanted = tuple(Placement(version="v0", name=A.name, engine=e, share=s) for e, s in shares.items())
    desk.tell(Begin(wanted, ADAPTERS, frozenset(), 1.0))
    desk.answer("e0", 1)
    desk.answer("e1", 1)
    (write,) = desk.answer("e2", 1, v0="corrupt")
    assert isinstance(write, Write)
    assert {p.engine: p.share for p in write.plan.placements} == pytest.approx({"e0": 0.75, "e1": 0.25})


@pytest.mark.parametrize("silent", [True, False])
def test_an_engine_lost_while_it_prepares_is_done_without_and_planned_for_again_when_it_is_back(silent: bool) -> None:
    desk = Desk(plan(4, ("e0", A)))
    desk.begin(("e0", A), ("e1", A), ("e1", B))
    assert desk.answer("e0", 5) == []
    lost = desk.tell(PrepareFailed("e1", 5, "no answer")) if silent else desk.see(BOTH[0])
    assert lost == [Write(plan(5, ("e0", A)))], "nobody had B"
    desk.write(lost)
    for engine in ("e0", "e1"):
        desk.tell(RetireEnded(engine, 5))
    assert desk.see(holding("e0", A)) == []
    assert desk.see(holding("e0", A), engine_load("e1", incarnation="i2")) == [Replan("e1")]
    assert desk.see(holding("e0", A), engine_load("e1", incarnation="i2")) == []


def test_of_an_engine_that_did_not_answer_in_time_what_it_holds_is_planned_and_the_rest_is_not() -> None:
    desk = Desk(plan(4, ("e0", A), ("e0", B)), (holding("e0", A, B), holding("e1")))
    desk.begin(("e0", A), ("e1", A), ("e1", B), ("e1", C))
    desk.answer("e0", 5)
    desk.see(holding("e0", A, B), holding("e1", A))
    silent = desk.tell(PrepareFailed("e1", 5, "no answer"))
    assert silent == [Write(plan(5, ("e0", A), ("e1", A), ("e0", B)))], "B does not move, and C is nowhere"
    assert desk.write(silent)[1:] == retires(5, e0=("v0", "v1"), e1=("v0",))
    for engine in ("e0", "e1"):
        ended = desk.tell(RetireEnded(engine, 5))
    assert ended == [RolloutEnded(5, True, ("e1: no answer", "e1: no answer"))]


def test_an_engine_that_did_not_answer_and_then_is_lost_is_done_without() -> None:
    desk = Desk(plan(4, ("e0", A)), (holding("e0", A), holding("e1", A)))
    desk.begin(("e0", A), ("e1", A))
    assert desk.tell(PrepareFailed("e1", 5, "no answer")) == []
    assert desk.see(holding("e0", A), engine_load("e1", incarnation="i2")) == []
    assert desk.answer("e0", 5) == [Write(plan(5, ("e0", A)))]


def test_a_copy_that_was_not_seen_in_time_stays_planned_where_it_is_the_only_one() -> None:
    desk = Desk(plan(4, ("e0", A), ("e1", B)), (holding("e0", A), engine_load("e1")))
    desk.begin(("e0", A), ("e1", B))
    desk.answer("e0", 5)
    assert desk.tell(PrepareFailed("e1", 5, "no answer")) == [Write(plan(5, ("e0", A), ("e1", B)))]


def test_an_adapter_whose_only_engine_was_lost_stays_planned_there() -> None:
    desk = Desk(plan(4, ("e0", A), ("e1", B)), (holding("e0", A), holding("e1", B)))
    desk.begin(("e1", A), ("e1", B))
    assert desk.see(holding("e0", A)) == [Write(plan(5, ("e0", A), ("e1", B)))]


def test_a_copy_that_cannot_be_loaded_any_more_is_not_planned_again() -> None:
    desk = Desk(plan(4, ("e0", A), ("e1", B)), (holding("e0", A), engine_load("e1")))
    desk.begin(("e0", A), ("e1", B))
    desk.answer("e0", 5)
    assert desk.answer("e1", 5, v1="corrupt") == [Write(plan(5, ("e0", A)))]


def test_engines_lost_after_they_prepared_are_done_without_all_at_once() -> None:
    desk = Desk(plan(4, ("e0", C)), [*BOTH, engine_load("e2")])
    desk.begin(("e0", A), ("e1", A), ("e2", A))
    desk.answer("e0", 5)
    desk.answer("e1", 5)
    (write,) = desk.see(engine_load("e0", incarnation="i2"), engine_load("e2", incarnation="i2"))
    assert write == Write(plan(5))


def test_a_plan_that_cannot_be_written_leaves_the_old_one_and_nothing_of_itself() -> None:
    before = plan(4, ("e0", A))
    desk = Desk(before)
    desk.begin(("e1", A))
    desk.answer("e1", 5)
    assert desk.tell(WriteFailed(5, "disk full")) == [Retire("e0", 5, ("v0",)), Retire("e1", 5, ())]
    desk.tell(RetireEnded("e0", 5))
    (ended,) = desk.tell(RetireEnded("e1", 5))
    assert ended == RolloutEnded(5, False, ("epoch 5 could not be written, epoch 4 stays: disk full",))
    assert desk.rollout.plan == before
    assert desk.begin(("e1", A)) == [Prepare("e1", 6, (A,))]


def test_a_newer_plan_takes_the_place_of_one_that_is_being_prepared() -> None:
    desk = Desk()
    desk.begin(("e0", A), ("e1", A))
    desk.answer("e0", 1)
    ended, prepare = desk.begin(("e0", B))
    assert ended == RolloutEnded(1, False, ("epoch 1 was given up for a newer plan",))
    assert prepare == Prepare("e0", 2, (B,))
    assert desk.answer("e1", 1) == [], "it is too late"
    assert desk.answer("e1", 2) == [], "it was not asked"
    assert desk.write(desk.answer("e0", 2)) == [Publish(plan(2, ("e0", B))), *retires(2, e0=("v1",), e1=())]


def test_one_that_is_given_up_leaves_no_pins() -> None:
    desk = Desk(plan(4, ("e0", A)))
    desk.begin(("e1", A))
    assert desk.tell(Cancel()) == [
        RolloutEnded(5, False, ("epoch 5 was given up for a newer plan",)),
        *retires(5, e0=("v0",), e1=()),
    ]
    assert desk.tell(Cancel()) == []
    assert desk.answer("e1", 5) == []


def test_answers_that_come_twice_count_once() -> None:
    desk = Desk()
    desk.begin(("e0", A), ("e1", A))
    assert desk.answer("e0", 1) == desk.answer("e0", 1, v0="now it says no") == []
    assert desk.answer("e1", 1) == [Write(plan(1, ("e0", A), ("e1", A)))]


def retires(epoch: int, **keep: tuple[str, ...]) -> list[Instruction]:
    return [Retire(engine, epoch, versions) for engine, versions in keep.items()]


def test_epochs_go_on_from_what_engines_have_heard_of() -> None:
    """The planner before this one died before it wrote, or lost its disk."""
    desk = Desk(engines=(engine_load("e0", plan_epoch=7), engine_load("e1", plan_epoch=9)))
    assert desk.begin(("e0", A)) == [Prepare("e0", 10, (A,))]


def test_what_a_dead_planner_prepared_is_retired() -> None:
    desk = Desk(plan(4, ("e0", A)), ())
    found = desk.see(holding("e0", A, B, plan_epoch=5), holding("e1", C, plan_epoch=5))
    assert found == retires(5, e0=("v0",), e1=())
    stale = (holding("e0", A, B, plan_epoch=5), holding("e1", plan_epoch=5))
    assert desk.see(*stale) == [], "reports are late"
    desk.now += RETRY_S
    assert desk.see(*stale) == retires(5, e0=("v0",)), "it was asked and did not hear"


def test_what_a_dead_planner_asked_for_and_is_still_to_come_is_given_up() -> None:
    assert Desk(plan(4), ()).see(engine_load("e0", plan_epoch=5)) == retires(5, e0=())


def test_a_restarted_engine_is_asked_for_its_copies_at_once_and_again_if_it_has_to_be() -> None:
    desk = Desk(plan(4, ("e0", A), ("e1", A)), (holding("e0", A), holding("e1", A)))
    assert desk.see(holding("e0", A), engine_load("e1", incarnation="i2")) == [Prepare("e1", 4, (A,))]
    assert desk.see(holding("e0", A), engine_load("e1", incarnation="i2")) == []
    assert desk.see(holding("e0", A), engine_load("e1", incarnation="i3")) == [Prepare("e1", 4, (A,))]
    desk.now += 10 * RETRY_S
    assert desk.see(holding("e0", A), engine_load("e1", incarnation="i3")) == [], "it is loading still"
    desk.answer("e1", 4, v0="corrupt")
    assert desk.see(holding("e0", A), engine_load("e1", incarnation="i3")) == []
    assert not desk.rollout.lacks_copies(desk.now)
    desk.now += RETRY_S
    assert desk.rollout.lacks_copies(desk.now)
    assert desk.see(holding("e0", A), engine_load("e1", incarnation="i3")) == [Prepare("e1", 4, (A,))]


def test_an_adapter_that_the_registry_does_not_know_is_not_asked_for() -> None:
    desk = Desk(plan(4, ("e0", A)), ())
    assert desk.tell(EnginesSeen((engine_load("e0"),), {})) == []


def test_a_planner_without_a_plan_leaves_engines_what_they_hold() -> None:
    assert Desk(engines=()).see(holding("e0", A, plan_epoch=7)) == []


def test_an_engine_lost_while_copies_are_retired_is_not_waited_for() -> None:
    desk = Desk()
    desk.begin(("e0", A))
    desk.write(desk.answer("e0", 1))
    assert desk.tell(RetireEnded("e0", 1)) == []
    assert desk.see(BOTH[0]) == [RolloutEnded(1, True, ())]
