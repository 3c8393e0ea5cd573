"""A step waits for the layers of an arriving slab, and no longer than its patience."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from loraserve.adapter.format import SlabHeader, make_layout
from loraserve.engine.loading.arrival import Arrival, Gate, late_requests, make_gate
from loraserve.engine.schedule.events import SequenceStep, StepBatch
from loraserve.messages.sampling import SamplingParams
from loraserve.model_shape import MODULES, SLICES, ModelShape

SHAPE = ModelShape(layers=4, hidden=16, heads=2, kv_heads=1, head_dim=8, ffn=24, vocab=64)
LONG_S, NOW_S = 60.0, 0.0


@pytest.fixture
def header() -> SlabHeader:
    rows = [(2,) * len(SLICES[module]) for _ in range(SHAPE.layers) for module in MODULES]
    return make_layout(SHAPE, "float32", rows, [(1.0,) * len(row) for row in rows])


@pytest.fixture
def stepping() -> Iterator[SimpleNamespace]:
    """Waits at a gate for each layer in a thread; ``passed`` are the layers that it let through."""
    made = SimpleNamespace(passed=[], changed=threading.Condition(), threads=[])

    def go(gate: Gate) -> threading.Thread:
        def step() -> None:
            for layer in range(SHAPE.layers):
                gate.wait(layer)
                with made.changed:
                    made.passed.append(layer)
                    made.changed.notify_all()

        thread = threading.Thread(target=step)
        made.threads.append(thread)
        thread.start()
        return thread

    def until(count: int) -> bool:
        with made.changed:
            return made.changed.wait_for(lambda: len(made.passed) >= count, timeout=LONG_S)

    made.go, made.until = go, until
    yield made
    for thread in made.threads:
        thread.join(LONG_S)


def test_the_gate_opens_for_each_layer_once_it_has_arrived(header: SlabHeader, stepping: SimpleNamespace) -> None:
    arrival = Arrival(header)
    gate = Gate({3: arrival}, LONG_S)
    thread = stepping.go(gate)
    for layer in range(SHAPE.layers):
        arrival.advance(header.layer(layer).stop - 1)
        assert stepping.passed == list(range(layer)), "its last byte is missing"
        arrival.advance(header.layer(layer).stop)
        assert stepping.until(layer + 1)
    thread.join(LONG_S)
    assert gate.late == set()


def test_a_step_goes_on_without_late_layers(header: SlabHeader) -> None:
    slow, quick = Arrival(header), Arrival(header)
    slow.advance(header.layer(1).stop)
    quick.advance(header.slab_bytes)
    gate = Gate({0: slow, 1: quick}, NOW_S)
    for layer in range(SHAPE.layers):
        gate.wait(layer)
        assert gate.late == ({0} if layer > 1 else set())
    slow.advance(header.slab_bytes)
    gate.wait(SHAPE.layers - 1)
    assert gate.late == {0}, "what was computed without it stays so"


def test_all_waits_of_a_step_share_its_patience(header: SlabHeader, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    waited: list[float] = []

    def wait_for(self: Arrival, layer: int, until_s: float) -> bool:
        nonlocal now_s
        waited.append(until_s - now_s)
        now_s += 2.0
        return True

    monkeypatch.setattr("loraserve.engine.loading.arrival.monotonic", lambda: now_s)
    monkeypatch.setattr(Arrival, "wait_for", wait_for)
    gate = Gate({0: Arrival(header), 1: Arrival(header)}, 5.0)
    gate.wait(0)
    gate.wait(1)
    assert waited == [5.0, 3.0, 1.0, -1.0]


def test_a_waiting_step_goes_on_at_once_when_the_read_is_abandoned(
    header: SlabHeader, stepping: SimpleNamespace
) -> None:
    arrival = Arrival(header)
    gate = Gate({0: arrival}, LONG_S)
    thread = stepping.go(gate)
    arrival.abandon()
    thread.join(LONG_S)
    assert not thread.is_alive()
    assert gate.late == {0}


def test_layers_of_an_abandoned_read_count_as_late(header: SlabHeader) -> None:
    arrival = Arrival(header)
    arrival.advance(header.slab_bytes)
    arrival.abandon()
    gate = Gate({0: arrival}, NOW_S)
    gate.wait(0)
    assert gate.late == {0}


def test_only_a_step_with_a_slot_that_arrives_has_a_gate(header: SlabHeader) -> None:
    def part(name: str, slot: int) -> SequenceStep:
        sampling = SamplingParams(max_tokens=1)
        return SequenceStep(
            request_id=name, tokens=(1,), start=0, blocks=(0,), sampling=sampling, prompt_length=1, slot=slot
        )

    batch = StepBatch(step_id=1, sequences=(part("base", -1), part("a", 2), part("b", 3), part("c", 2)))
    assert make_gate(batch, {}) is None
    assert make_gate(batch, {5: Arrival(header)}) is None
    assert late_requests(batch, None) == ()
    gate = make_gate(batch, {2: Arrival(header), 5: Arrival(header)})
    assert gate is not None
    gate.late.add(2)
    assert late_requests(batch, gate) == ("a", "c")


def test_a_slab_installed_while_the_gate_is_made_does_not_break_it(header: SlabHeader) -> None:
    class Installing(dict[int, Arrival]):
        """Return the arrival, and remove it as the other thread would."""

        def __contains__(self, slot: object) -> bool:
            found = super().__contains__(slot)
            self.clear()
            return found

    sampling = SamplingParams(max_tokens=1)
    part = SequenceStep(request_id="a", tokens=(1,), start=0, blocks=(0,), sampling=sampling, prompt_length=1, slot=2)
    batch = StepBatch(step_id=1, sequences=(part,))
    assert make_gate(batch, Installing({2: Arrival(header)})) is not None, "as it was when it was looked for"
