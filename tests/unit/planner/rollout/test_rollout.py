"""The roll-out of one plan after another, and failures in each phase."""

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
    """Return copies given as (engine, adapter), with equal shares."""
    count = {adapter.version: sum(a is adapter for _, a in pairs) for _, adapter in pairs}
    return tuple(Placement(version=a.version, name=a.name, engine=e, share=1 / count[a.version]) for e, a in pairs)


def plan(epoch: int, *pairs: tuple[str, Any], drained: tuple[str, ...] = ()) -> Plan:
    return Plan(epoch=epoch, created_unix_s=1.0, placements=copies(*pairs), drained=drained)


def holding(engine: str, *adapters: Any, **changes: Any) -> EngineLoad:
    return engine_load(engine, resident=tuple(resident(a, pinned=True) for a in adapters), **changes)


class CheckedRollout:
    """A roll-out with a hand-set clock that is validated after each event."""

    def __init__(self, before: Plan | None = None, engines: Iterable[EngineLoad] = BOTH) -> None:
        self.rollout = Rollout(before or plan(0))
        self.now = 100.0
        self.see(*engines)

    def handle(self, event: Event) -> list[Instruction]:
        instructions = self.rollout.handle(event, self.now)
        self.rollout.validate()
        return instructions

    def see(self, *engines: EngineLoad) -> list[Instruction]:
        return self.handle(EnginesSeen(engines, ADAPTERS))

    def begin(self, *pairs: tuple[str, Any], drained: Iterable[str] = ()) -> list[Instruction]:
        return self.handle(Begin(copies(*pairs), ADAPTERS, frozenset(drained), 1.0))

    def answer(self, engine: str, epoch: int, **failed: str) -> list[Instruction]:
        return self.handle(PrepareAnswered(engine, "i1", epoch, failed))

    def write(self, instructions: list[Instruction]) -> list[Instruction]:
        (write,) = instructions
        assert isinstance(write, Write)
        return self.handle(Written(write.plan.epoch))


def test_the_diagram_shows_the_transition_table() -> None:
    assert machine.__doc__ is not None
    lines = re.findall(r"^    (\w+) +--(\w+)--> +(\w+)", machine.__doc__, re.M)
    assert {(Phase(before), Trigger(trigger)): Phase(after) for before, trigger, after in lines} == TRANSITIONS
    assert len(lines) == len(TRANSITIONS)


def test_a_plan_may_not_begin_while_another_is_written() -> None:
    checked = CheckedRollout()
    checked.begin(("e0", A))
    checked.answer("e0", 1)
    assert checked.rollout.phase is Phase.WRITING
    with pytest.raises(AssertionError, match="while the plan of the last is being written"):
        checked.begin(("e0", B))


def test_while_a_plan_is_written_engines_are_held_to_neither_plan() -> None:
    checked = CheckedRollout(plan(4, ("e0", A)), (holding("e0", A), holding("e1")))
    checked.begin(("e1", B))
    (write,) = checked.answer("e1", 5)
    assert checked.see(holding("e0", A), holding("e1", B, plan_epoch=5)) == []
    assert checked.see(holding("e0", A), engine_load("e1", incarnation="i2")) == []
    assert checked.handle(Cancel()) == []
    assert checked.write([write]) == [Publish(plan(5, ("e1", B))), *retires(5, e0=(), e1=("v1",))]
    checked.handle(RetireEnded("e0", 5))
    checked.handle(RetireEnded("e1", 5))
    restarted = engine_load("e1", incarnation="i2")
    assert checked.see(holding("e0"), restarted) == [Prepare("e1", 5, (B,))], "it restarted after it had prepared"


def test_the_story_of_an_adapter_says_where_its_copies_went() -> None:
    checked = CheckedRollout(plan(4, ("e0", A)))
    checked.begin(("e1", A))
    checked.write(checked.answer("e1", 5))
    assert checked.rollout.story.lines("v0") == ["100.000 plan epoch 5: copies on e1 (100% of its requests)"]


def test_a_plan_is_prepared_written_published_and_then_the_old_copies_retired() -> None:
    checked = CheckedRollout(plan(4, ("e0", A), ("e1", B)), (holding("e0", A), holding("e1", B)))
    assert checked.begin(("e1", A), ("e1", B)) == [Prepare("e1", 5, (A, B))]
    (write,) = written = checked.answer("e1", 5)
    assert write == Write(plan(5, ("e1", A), ("e1", B)))
    assert checked.rollout.plan.epoch == 4, "what is not written is not in force"
    new = plan(5, ("e1", A), ("e1", B))
    assert checked.write(written) == [Publish(new), Retire("e0", 5, ()), Retire("e1", 5, ("v0", "v1"))]
    assert checked.handle(RetireEnded("e0", 5)) == []
    assert checked.handle(RetireEnded("e1", 5)) == [RolloutEnded(5, True, ())]
    assert (checked.rollout.plan, checked.rollout.phase) == (new, Phase.IDLE)
    assert checked.rollout.story.entries("epoch-5")[-1].text == "in force"


def test_an_empty_plan_is_written_at_once() -> None:
    checked = CheckedRollout(plan(4, ("e0", A)))
    assert checked.write(checked.begin()) == [Publish(plan(5)), Retire("e0", 5, ()), Retire("e1", 5, ())]


def test_a_move_whose_target_failed_keeps_the_source() -> None:
    checked = CheckedRollout(plan(4, ("e0", A), ("e0", B)))
    checked.begin(("e1", A), ("e1", B))
    (write,) = checked.answer("e1", 5, v0="corrupt")
    assert write == Write(plan(5, ("e0", A), ("e1", B)))
    assert Retire("e0", 5, ("v0",)) in checked.write([write])


def test_each_failed_copy_keeps_one_old_copy_and_those_on_drained_engines_last() -> None:
    checked = CheckedRollout(plan(4, ("e0", A), ("e1", A)), [*BOTH, engine_load("e2")])
    checked.begin(("e2", A), drained=["e0"])
    (write,) = checked.answer("e2", 5, v0="corrupt")
    assert write == Write(plan(5, ("e1", A), drained=("e0",)))


def test_unequal_shares_keep_their_proportion_when_a_copy_is_left_out() -> None:
    checked = CheckedRollout(engines=[*BOTH, engine_load("e2")])
    shares = {"e0": 0.6, "e1": 0.2, "e2": 0.2}
    wanted = tuple(Placement(version="v0", name=A.name, engine=e, share=s) for e, s in shares.items())
    checked.handle(Begin(wanted, ADAPTERS, frozenset(), 1.0))
    checked.answer("e0", 1)
    checked.answer("e1", 1)
    (write,) = checked.answer("e2", 1, v0="corrupt")
    assert isinstance(write, Write)
    assert {p.engine: p.share for p in write.plan.placements} == pytest.approx({"e0": 0.75, "e1": 0.25})


@pytest.mark.parametrize("silent", [True, False])
def test_an_engine_lost_while_preparing_is_left_out_and_replanned_for_when_it_returns(silent: bool) -> None:
    checked = CheckedRollout(plan(4, ("e0", A)))
    checked.begin(("e0", A), ("e1", A), ("e1", B))
    assert checked.answer("e0", 5) == []
    lost = checked.handle(PrepareFailed("e1", 5, "no answer")) if silent else checked.see(BOTH[0])
    assert lost == [Write(plan(5, ("e0", A)))], "no engine held B"
    checked.write(lost)
    for engine in ("e0", "e1"):
        checked.handle(RetireEnded(engine, 5))
    assert checked.see(holding("e0", A)) == []
    assert checked.see(holding("e0", A), engine_load("e1", incarnation="i2")) == [Replan("e1")]
    assert checked.see(holding("e0", A), engine_load("e1", incarnation="i2")) == []


def test_only_the_reported_copies_of_an_engine_that_timed_out_are_planned() -> None:
    checked = CheckedRollout(plan(4, ("e0", A), ("e0", B)), (holding("e0", A, B), holding("e1")))
    checked.begin(("e0", A), ("e1", A), ("e1", B), ("e1", C))
    checked.answer("e0", 5)
    checked.see(holding("e0", A, B), holding("e1", A))
    silent = checked.handle(PrepareFailed("e1", 5, "no answer"))
    assert silent == [Write(plan(5, ("e0", A), ("e1", A), ("e0", B)))], "B does not move, and C is nowhere"
    assert checked.write(silent)[1:] == retires(5, e0=("v0", "v1"), e1=("v0",))
    for engine in ("e0", "e1"):
        ended = checked.handle(RetireEnded(engine, 5))
    assert ended == [RolloutEnded(5, True, ("e1: no answer", "e1: no answer"))]


def test_an_engine_that_timed_out_and_then_was_lost_is_left_out() -> None:
    checked = CheckedRollout(plan(4, ("e0", A)), (holding("e0", A), holding("e1", A)))
    checked.begin(("e0", A), ("e1", A))
    assert checked.handle(PrepareFailed("e1", 5, "no answer")) == []
    assert checked.see(holding("e0", A), engine_load("e1", incarnation="i2")) == []
    assert checked.answer("e0", 5) == [Write(plan(5, ("e0", A)))]


def test_the_only_copy_of_an_adapter_stays_planned_on_an_engine_that_timed_out() -> None:
    checked = CheckedRollout(plan(4, ("e0", A), ("e1", B)), (holding("e0", A), engine_load("e1")))
    checked.begin(("e0", A), ("e1", B))
    checked.answer("e0", 5)
    assert checked.handle(PrepareFailed("e1", 5, "no answer")) == [Write(plan(5, ("e0", A), ("e1", B)))]


def test_an_adapter_whose_only_engine_was_lost_stays_planned_there() -> None:
    checked = CheckedRollout(plan(4, ("e0", A), ("e1", B)), (holding("e0", A), holding("e1", B)))
    checked.begin(("e1", A), ("e1", B))
    assert checked.see(holding("e0", A)) == [Write(plan(5, ("e0", A), ("e1", B)))]


def test_a_copy_that_can_no_longer_be_loaded_leaves_the_plan() -> None:
    checked = CheckedRollout(plan(4, ("e0", A), ("e1", B)), (holding("e0", A), engine_load("e1")))
    checked.begin(("e0", A), ("e1", B))
    checked.answer("e0", 5)
    assert checked.answer("e1", 5, v1="corrupt") == [Write(plan(5, ("e0", A)))]


def test_engines_lost_after_preparing_are_all_left_out_at_once() -> None:
    checked = CheckedRollout(plan(4, ("e0", C)), [*BOTH, engine_load("e2")])
    checked.begin(("e0", A), ("e1", A), ("e2", A))
    checked.answer("e0", 5)
    checked.answer("e1", 5)
    (write,) = checked.see(engine_load("e0", incarnation="i2"), engine_load("e2", incarnation="i2"))
    assert write == Write(plan(5))


def test_a_plan_that_cannot_be_written_leaves_the_old_plan_and_no_pins() -> None:
    before = plan(4, ("e0", A))
    checked = CheckedRollout(before)
    checked.begin(("e1", A))
    checked.answer("e1", 5)
    assert checked.handle(WriteFailed(5, "disk full")) == [Retire("e0", 5, ("v0",)), Retire("e1", 5, ())]
    checked.handle(RetireEnded("e0", 5))
    (ended,) = checked.handle(RetireEnded("e1", 5))
    assert ended == RolloutEnded(5, False, ("epoch 5 could not be written, epoch 4 stays: disk full",))
    assert checked.rollout.plan == before
    assert checked.begin(("e1", A)) == [Prepare("e1", 6, (A,))]


def test_a_newer_plan_replaces_one_that_is_being_prepared() -> None:
    checked = CheckedRollout()
    checked.begin(("e0", A), ("e1", A))
    checked.answer("e0", 1)
    ended, prepare = checked.begin(("e0", B))
    assert ended == RolloutEnded(1, False, ("epoch 1 was given up for a newer plan",))
    assert prepare == Prepare("e0", 2, (B,))
    assert checked.answer("e1", 1) == [], "the answer is late"
    assert checked.answer("e1", 2) == [], "the engine was not asked"
    assert checked.write(checked.answer("e0", 2)) == [Publish(plan(2, ("e0", B))), *retires(2, e0=("v1",), e1=())]


def test_a_cancelled_roll_out_leaves_no_pins() -> None:
    checked = CheckedRollout(plan(4, ("e0", A)))
    checked.begin(("e1", A))
    assert checked.handle(Cancel()) == [
        RolloutEnded(5, False, ("epoch 5 was given up for a newer plan",)),
        *retires(5, e0=("v0",), e1=()),
    ]
    assert checked.handle(Cancel()) == []
    assert checked.answer("e1", 5) == []


def test_repeated_answers_count_once() -> None:
    checked = CheckedRollout()
    checked.begin(("e0", A), ("e1", A))
    assert checked.answer("e0", 1) == checked.answer("e0", 1, v0="now it says no") == []
    assert checked.answer("e1", 1) == [Write(plan(1, ("e0", A), ("e1", A)))]


def retires(epoch: int, **keep: tuple[str, ...]) -> list[Instruction]:
    return [Retire(engine, epoch, versions) for engine, versions in keep.items()]


def test_epochs_continue_from_the_greatest_that_an_engine_reports() -> None:
    """The planner before this one died before its write, or lost its disk."""
    checked = CheckedRollout(engines=(engine_load("e0", plan_epoch=7), engine_load("e1", plan_epoch=9)))
    assert checked.begin(("e0", A)) == [Prepare("e0", 10, (A,))]


def test_pins_of_a_dead_planner_are_retired() -> None:
    checked = CheckedRollout(plan(4, ("e0", A)), ())
    found = checked.see(holding("e0", A, B, plan_epoch=5), holding("e1", C, plan_epoch=5))
    assert found == retires(5, e0=("v0",), e1=())
    stale = (holding("e0", A, B, plan_epoch=5), holding("e1", plan_epoch=5))
    assert checked.see(*stale) == [], "reports are late"
    checked.now += RETRY_S
    assert checked.see(*stale) == retires(5, e0=("v0",)), "the request was lost"


def test_loads_that_a_dead_planner_asked_for_are_retired() -> None:
    assert CheckedRollout(plan(4), ()).see(engine_load("e0", plan_epoch=5)) == retires(5, e0=())


def test_a_restarted_engine_is_asked_for_its_copies_at_once_and_later_again() -> None:
    checked = CheckedRollout(plan(4, ("e0", A), ("e1", A)), (holding("e0", A), holding("e1", A)))
    assert checked.see(holding("e0", A), engine_load("e1", incarnation="i2")) == [Prepare("e1", 4, (A,))]
    assert checked.see(holding("e0", A), engine_load("e1", incarnation="i2")) == []
    assert checked.see(holding("e0", A), engine_load("e1", incarnation="i3")) == [Prepare("e1", 4, (A,))]
    checked.now += 10 * RETRY_S
    assert checked.see(holding("e0", A), engine_load("e1", incarnation="i3")) == [], "it is still loading"
    checked.answer("e1", 4, v0="corrupt")
    assert checked.see(holding("e0", A), engine_load("e1", incarnation="i3")) == []
    assert not checked.rollout.lacks_copies(checked.now)
    checked.now += RETRY_S
    assert checked.rollout.lacks_copies(checked.now)
    assert checked.see(holding("e0", A), engine_load("e1", incarnation="i3")) == [Prepare("e1", 4, (A,))]


def test_an_unregistered_adapter_is_not_asked_for() -> None:
    checked = CheckedRollout(plan(4, ("e0", A)), ())
    assert checked.handle(EnginesSeen((engine_load("e0"),), {})) == []


def test_without_a_plan_engines_keep_what_they_hold() -> None:
    assert CheckedRollout(engines=()).see(holding("e0", A, plan_epoch=7)) == []


def test_an_engine_lost_while_retiring_is_not_waited_for() -> None:
    checked = CheckedRollout()
    checked.begin(("e0", A))
    checked.write(checked.answer("e0", 1))
    assert checked.handle(RetireEnded("e0", 1)) == []
    assert checked.see(BOTH[0]) == [RolloutEnded(1, True, ())]
