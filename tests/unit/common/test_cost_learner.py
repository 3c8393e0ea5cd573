"""The learner uses each measurement once. An idle engine repeats its last measurements in every report."""

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


def learn_all(*rounds: list[EngineLoad], engines: tuple[str, ...] = ("engine-0",)) -> CostModel:
    learner = CostLearner(COST)
    for loads in rounds:
        learner.learn(loads, engines)
    return learner.cost


def report(name: str = "engine-0", **changes: Any) -> EngineLoad:
    """Return the report of an engine whose only measurements are ``changes``."""
    nothing = {"decode_step_s": 0.0, "prefill_tokens_per_s": 0.0, "load_bytes": 0.0, "load_bytes_per_s": 0.0}
    return engine_load(name, **{**nothing, **changes})


def slow(kind: str) -> EngineLoad:
    return report(**SLOW[kind])


def accurate(name: str, number: int) -> EngineLoad:
    """Return the report of an engine after ``number`` steps of each kind that took exactly the predicted time."""
    return report(
        name,
        decode_step=mean_step(DECODE, COST.step_s(DECODE)),
        decode_steps=number,
        prefill_step=mean_step(PREFILL, COST.step_s(PREFILL)),
        prefill_steps=number,
    )


def test_slow_first_prefills_of_idle_engines_do_not_outweigh_a_busy_engine() -> None:
    idle = [report(f"idle-{n}", **SLOW["prefill_step"]) for n in range(3)]
    names = ("busy", *(load.engine for load in idle))
    cost = learn_all(*([accurate("busy", number), *idle] for number in range(1, 301)), engines=names)
    assert cost.step_s(PREFILL) == pytest.approx(COST.step_s(PREFILL), rel=0.02)


@each_kind
def test_a_repeated_report_is_learned_once(kind: str) -> None:
    slow_report = slow(kind)
    once = learn_all([slow_report])
    assert once == COST.observe(slow_report.speed)
    assert once != COST
    assert learn_all(*[[slow_report]] * 10) == once


@each_kind
def test_a_higher_count_is_a_new_measurement_of_its_kind_only(kind: str) -> None:
    once = report(**ALL_SLOW)
    later = report(**{**ALL_SLOW, COUNT_OF[kind]: 2})
    assert learn_all([once], [later]) == COST.observe(once.speed).observe(slow(kind).speed)


def test_measurements_of_an_engine_without_running_requests_are_learned() -> None:
    assert learn_all([report(running=0, **SLOW["decode_step"])]) != COST


def test_a_restarted_engine_starts_with_new_counts() -> None:
    old = report(**{**ALL_SLOW, "decode_steps": 50, "prefill_steps": 50, "loads": 50})
    new = report(incarnation="i2", **ALL_SLOW)
    assert learn_all([old], [new]) == COST.observe(old.speed).observe(new.speed)
    assert learn_all([old], [new], [new]) == learn_all([old], [new])


def test_a_missing_report_does_not_make_old_measurements_new() -> None:
    once = report(**ALL_SLOW)
    assert learn_all([once], [], [once]) == learn_all([once])


def test_engines_that_are_no_longer_known_are_forgotten() -> None:
    learner = CostLearner(COST)
    for number in range(100):
        learner.learn([report(f"e{number}", **ALL_SLOW)], (f"e{number}", f"e{number - 1}"))
    assert learner.known_engines() == {"e98", "e99"}
