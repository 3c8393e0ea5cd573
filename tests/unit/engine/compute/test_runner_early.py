"""A step computes with the first layers of a slab while the last are still being read, on a tiny model."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loraserve.adapter.pack import Slab
from loraserve.engine.compute.runner import CpuRunner
from loraserve.engine.loading import arrival as arrivals
from loraserve.engine.loading.arrival import Arrival, LayeredRunner
from loraserve.engine.schedule.events import StepBatch, StepResult

MakeRunner = Callable[..., CpuRunner]
PROMPT = [5, 6, 7, 8]
LONG_S = 60.0


@pytest.fixture
def runner(make_runner: MakeRunner) -> CpuRunner:
    made = make_runner()
    assert isinstance(made, LayeredRunner)
    return made


@pytest.fixture
def slab(strong_slab: Callable[[str], Slab]) -> Slab:
    return strong_slab("llama")


def step(helpers: Any, runner: CpuRunner, *slots: int) -> StepResult:
    """Compute the first step of one request per slot."""
    streams = [helpers.Stream(f"slot {slot}", PROMPT, blocks=[number], slot=slot) for number, slot in enumerate(slots)]
    return runner.step(StepBatch(step_id=1, sequences=tuple(stream.next(16) for stream in streams)))


def tokens(result: StepResult) -> dict[str, int]:
    return {sampled.request_id: sampled.token for sampled in result.sampled}


def spoil(runner: CpuRunner, slab: Slab) -> None:
    """Fill the slab's extent with NaN, so that reading it too early shows."""
    runner.pool.write(0, np.full(slab.header.elements, np.nan, np.float32).tobytes())


@pytest.fixture
def expected(runner: CpuRunner, slab: Slab, helpers: SimpleNamespace) -> dict[str, int]:
    runner.pool.write(0, slab.data)
    runner.install(0, slab.header, 0)
    found = tokens(step(helpers, runner, -1, 0))
    runner.remove(0)
    spoil(runner, slab)
    assert found["slot -1"] != found["slot 0"]
    return found


def test_each_layer_is_computed_once_it_has_been_read(
    runner: CpuRunner,
    slab: Slab,
    helpers: SimpleNamespace,
    expected: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arrivals, "PATIENCE_S", LONG_S)
    arrival = Arrival(slab.header)
    waits_for: list[int] = []
    came = threading.Condition()
    wait_for = Arrival.wait_for

    def noted(self: Arrival, layer: int, until_s: float) -> bool:
        with came:
            waits_for.append(layer)
            came.notify_all()
        return wait_for(self, layer, until_s)

    monkeypatch.setattr(Arrival, "wait_for", noted)
    runner.arrive(0, slab.header, 0, arrival)
    results: list[StepResult] = []
    thread = threading.Thread(target=lambda: results.append(step(helpers, runner, -1, 0)))
    thread.start()
    for layer in range(slab.header.shape.layers):
        with came:
            assert came.wait_for(lambda layer=layer: layer in waits_for, timeout=LONG_S)
        part = slab.header.layer(layer)
        runner.pool.write(part.start, slab.data[part.start : part.stop])
        arrival.advance(part.stop)
    thread.join(LONG_S)
    assert waits_for == list(range(slab.header.shape.layers))
    assert tokens(results[0]) == expected
    assert results[0].late == ()


def test_a_late_request_is_named_and_does_not_affect_others(
    runner: CpuRunner, slab: Slab, helpers: SimpleNamespace, expected: dict[str, int]
) -> None:
    arrival = Arrival(slab.header)
    runner.arrive(0, slab.header, 0, arrival)
    first = slab.header.layer(0)
    runner.pool.write(first.start, slab.data[first.start : first.stop])
    arrival.advance(first.stop)
    result = step(helpers, runner, -1, 0)
    assert result.late == ("slot 0",)
    assert tokens(result)["slot -1"] == expected["slot -1"]


def test_steps_do_not_wait_for_an_installed_slab(
    runner: CpuRunner, slab: Slab, helpers: SimpleNamespace, expected: dict[str, int]
) -> None:
    runner.arrive(0, slab.header, 0, Arrival(slab.header))
    runner.pool.write(0, slab.data)
    runner.install(0, slab.header, 0)
    result = step(helpers, runner, -1, 0)
    assert (tokens(result), result.late) == (expected, ())


def test_steps_do_not_wait_for_a_removed_slot(
    runner: CpuRunner, slab: Slab, helpers: SimpleNamespace, expected: dict[str, int]
) -> None:
    runner.arrive(0, slab.header, 0, Arrival(slab.header))
    runner.remove(0)
    result = step(helpers, runner, 0)
    assert (tokens(result), result.late) == ({"slot 0": expected["slot -1"]}, ())


def test_a_second_read_replaces_a_failed_one(
    runner: CpuRunner, slab: Slab, helpers: SimpleNamespace, expected: dict[str, int]
) -> None:
    failed, next_one = Arrival(slab.header), Arrival(slab.header)
    runner.arrive(0, slab.header, 0, failed)
    failed.abandon()
    runner.arrive(0, slab.header, 0, next_one)
    runner.pool.write(0, slab.data)
    next_one.advance(slab.header.slab_bytes)
    result = step(helpers, runner, -1, 0)
    assert (tokens(result), result.late) == (expected, ())


def test_an_unusable_slab_is_refused_when_it_arrives(make_runner: MakeRunner, slab: Slab) -> None:
    runner = make_runner(slab_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"slab is float32, engine\.slab_dtype is bfloat16; register"):
        runner.arrive(0, slab.header, 0, Arrival(slab.header))
    with pytest.raises(ValueError, match="bfloat16"):
        runner.install(0, slab.header, 0)
