"""The learner takes each measurement once: what an idle engine repeats is no news."""

import msgspec
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


def slow(kind: str) -> EngineLoad:
    """Of an engine that measured this and nothing else."""
    return engine_load(**{"load_bytes": 0.0, **SLOW[kind]})


def truthful(name: str, number: int) -> EngineLoad:
    """Of an engine that has had so many steps of either kind, all as the model says."""
    return engine_load(
        name,
        decode_step=mean_step(DECODE, COST.step_s(DECODE)),
        decode_steps=number,
        prefill_step=mean_step(PREFILL, COST.step_s(PREFILL)),
        prefill_steps=number,
    )


def test_slow_first_prefill_of_idle_engines_does_not_outweigh_what_a_busy_one_measures() -> None:
    idle = [engine_load(f"idle-{n}", **SLOW["prefill_step"]) for n in range(3)]
    names = ("busy", *(load.engine for load in idle))
    cost = after(*([truthful("busy", number), *idle] for number in range(1, 301)), engines=names)
    assert cost.step_s(PREFILL) == pytest.approx(COST.step_s(PREFILL), rel=0.02)


@each_kind
def test_a_report_teaches_once(kind: str) -> None:
    report = slow(kind)
    once = after([report])
    assert once == COST.observe(report)
    assert once != COST
    assert after(*[[report]] * 10) == once


@each_kind
def test_what_was_counted_since_is_news_though_it_was_the_same(kind: str) -> None:
    """Of its own kind alone."""
    report = engine_load(**ALL_SLOW)
    later = msgspec.structs.replace(report, **{COUNT_OF[kind]: 2})
    assert after([report], [later]) == COST.observe(report).observe(slow(kind))


def test_short_requests_that_ended_before_the_report_teach_too() -> None:
    assert after([msgspec.structs.replace(slow("decode_step"), running=0)]) != COST


def test_an_engine_that_began_anew_counts_anew() -> None:
    old = engine_load(**{**ALL_SLOW, "decode_steps": 50, "prefill_steps": 50, "loads": 50})
    new = engine_load(incarnation="i2", **ALL_SLOW)
    assert after([old], [new]) == COST.observe(old).observe(new)
    assert after([old], [new], [new]) == after([old], [new])


def test_an_engine_that_does_not_report_for_a_while_has_not_counted_anew() -> None:
    report = engine_load(**ALL_SLOW)
    assert after([report], [], [report]) == after([report])


def test_engines_that_are_gone_are_forgotten() -> None:
    learner = CostLearner(COST)
    for number in range(100):
        learner.learn([engine_load(f"e{number}", **ALL_SLOW)], (f"e{number}", f"e{number - 1}"))
    assert learner.remembered() == {"e98", "e99"}
