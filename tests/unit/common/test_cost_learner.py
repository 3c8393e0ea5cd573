"""The learner takes each measurement once: what an idle engine repeats is no news."""

from typing import Any

import pytest

from loraserve.cost import CostLearner, CostModel, StepShape, mean_step
from loraserve.messages import EngineLoad
from loraserve.testing.reports import engine_load

COST = CostModel()
DECODE = StepShape(decode_sequences=8, kv_tokens=4000)
PREFILL = StepShape(prefill_tokens=32)
SLOW = {
    "decode_step": {"decode_step": mean_step(DECODE, 1.0), "decode_steps": 1},
    "prefill_step": {"prefill_step": mean_step(PREFILL, 3.0), "prefill_steps": 1},
    "load": {"load_bytes": 1e6, "load_bytes_per_s": 1e5, "loads": 1},
}
ALL_SLOW = {field: value for fields in SLOW.values() for field, value in fields.items()}
COUNT_OF = {"decode_step": "decode_steps", "prefill_step": "prefill_steps", "load": "loads"}

each_kind = pytest.mark.parametrize("kind", SLOW)


def after(*pictures: list[EngineLoad], engines: tuple[str, ...] = ("engine-0",)) -> CostModel:
    learner = CostLearner(COST)
    for loads in pictures:
        learner.learn(loads, engines)
    return learner.cost


def report(name: str = "engine-0", **changes: Any) -> EngineLoad:
    """Of an engine that measured this and nothing else."""
    nothing = {"decode_step_s": 0.0, "prefill_tokens_per_s": 0.0, "load_bytes": 0.0, "load_bytes_per_s": 0.0}
    return engine_load(name, **{**nothing, **changes})


def slow(kind: str) -> EngineLoad:
    """Of an engine that measured this and nothing else."""
    return report(**SLOW[kind])


def truthful(name: str, number: int) -> EngineLoad:
    """Of an engine that has had so many steps of either kind, all as the model says."""
    return report(
        name,
        decode_step=mean_step(DECODE, COST.step_s(DECODE)),
        decode_steps=number,
        prefill_step=mean_step(PREFILL, COST.step_s(PREFILL)),
        prefill_steps=number,
    )


def test_slow_first_prefill_of_idle_engines_does_not_outweigh_what_a_busy_one_measures() -> None:
    idle = [report(f"idle-{n}", **SLOW["prefill_step"]) for n in range(3)]
    names = ("busy", *(load.engine for load in idle))
    cost = after(*([truthful("busy", number), *idle] for number in range(1, 301)), engines=names)
    assert cost.step_s(PREFILL) == pytest.approx(COST.step_s(PREFILL), rel=0.02)


@each_kind
def test_a_report_teaches_once(kind: str) -> None:
    slow_report = slow(kind)
    once = after([slow_report])
    assert once == COST.observe(slow_report.speed)
    assert once != COST
    assert after(*[[slow_report]] * 10) == once


@each_kind
def test_what_was_counted_since_is_news_though_it_was_the_same(kind: str) -> None:
    """Of its own kind alone."""
    once = report(**ALL_SLOW)
    later = report(**{**ALL_SLOW, COUNT_OF[kind]: 2})
    assert after([once], [later]) == COST.observe(once.speed).observe(slow(kind).speed)


def test_short_requests_that_ended_before_the_report_teach_too() -> None:
    assert after([report(running=0, **SLOW["decode_step"])]) != COST


def test_an_engine_that_began_anew_counts_anew() -> None:
    old = report(**{**ALL_SLOW, "decode_steps": 50, "prefill_steps": 50, "loads": 50})
    new = report(incarnation="i2", **ALL_SLOW)
    assert after([old], [new]) == COST.observe(old.speed).observe(new.speed)
    assert after([old], [new], [new]) == after([old], [new])


def test_an_engine_that_does_not_report_for_a_while_has_not_counted_anew() -> None:
    once = report(**ALL_SLOW)
    assert after([once], [], [once]) == after([once])


def test_engines_that_are_gone_are_forgotten() -> None:
    learner = CostLearner(COST)
    for number in range(100):
        learner.learn([report(f"e{number}", **ALL_SLOW)], (f"e{number}", f"e{number - 1}"))
    assert learner.known_engines() == {"e98", "e99"}
