"""Early starts in the engine's process, with an estimate that always allows them."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from loraserve.adapter.pack import Slab
from loraserve.bus.protocol import Envelope
from loraserve.config import TransferConfig
from loraserve.engine.loading import arrival, sources, speeds
from loraserve.engine.loading.arrival import Gate
from loraserve.messages import ReadRegion, ToEngine
from loraserve.testing.scripted_owner import ScriptedOwner

Play = Callable[..., None]
LONG_S = 20.0


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "min_prefill_tokens", lambda left_s, measured: 1)


def patience(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(arrival, "PATIENCE_S", seconds)


def last_chunk(stage: Any, adapter: str) -> Callable[[Any], bool]:
    """Return whether a message asks for the last chunk. Repeated requests for it show that the rest has arrived."""
    size = stage.models.refs[adapter].slab_bytes
    return lambda message: bool(message.offset_bytes + message.length_bytes == size)


def test_a_request_that_starts_before_the_last_chunk_gets_the_right_tokens(
    play: Play, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Any) -> None:
        patience(monkeypatch, LONG_S)
        in_step = threading.Event()
        wait = Gate.wait

        def waits(self: Gate, layer: int) -> None:
            in_step.set()
            wait(self, layer)
            if layer == models.slabs["one"].header.shape.layers - 1:
                verified.wait(LONG_S)

        verified = threading.Event()
        monkeypatch.setattr(Gate, "wait", waits)
        stage.store.holds = last_chunk(stage, "one")
        await stage.admit("early", "one")
        await stage.until(in_step.is_set)
        stage.store.holds = lambda message: False
        residency = stage.engine._scheduler.residency
        await stage.until(lambda: residency.is_ready(models.refs["one"].version))
        verified.set()
        await stage.finished("early")
        assert stage.tokens["early"] == models.expected("one", 8)
        await stage.fresh_load()
        assert (stage.counters.early_starts, stage.counters.early_starts_in_vain, stage.counters.leaks) == (1, 0, 0)

    play(scenario)


def test_a_late_request_starts_again_while_others_decode(
    play: Play, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Any) -> None:
        patience(monkeypatch, 0.001)
        stage.store.holds = last_chunk(stage, "one")
        await stage.admit("base", tokens=300)
        await stage.admit("early", "one")
        await stage.until(lambda: stage.engine._scheduler.early.discarded == 1)
        seen = len(stage.tokens["base"])
        await stage.until(lambda: len(stage.tokens["base"]) > seen + 20)
        assert stage.tokens["early"] == []
        stage.store.holds = lambda message: False
        await stage.finished("base", "early")
        assert stage.tokens["early"] == models.expected("one", 8)
        assert stage.tokens["base"] == models.expected("", 300)
        assert (await stage.fresh_counters()).early_starts_in_vain == 1, "it waited for the rest of that read"

    play(scenario)


def damaged(slab: Slab) -> Slab:
    """Return the slab with its last layer damaged."""
    data = bytearray(slab.data)
    data[-1] ^= 1
    return Slab(slab.header, memoryview(data), slab.version)


def test_tokens_computed_with_a_damaged_copy_are_never_sent(
    play: Play, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Any) -> None:
        patience(monkeypatch, 0.001)
        owner = ScriptedOwner(stage.network.bus("engine-1", ToEngine), damaged(models.slabs["one"]))
        stage.beside(owner.serve())
        stage.holders = (owner.holder(),)
        stage.store.holds = last_chunk(stage, "one")
        await stage.admit("early", "one")
        early = stage.engine._scheduler.early
        await stage.until(lambda: early.started >= 1 and stage.store.chunks_asked)
        stage.store.holds = lambda message: False
        await stage.finished("early")
        assert stage.tokens["early"] == models.expected("one", 8)
        assert any(each.mismatched for each in (await stage.fresh_counters()).reads)
        assert stage.counters.leaks == 0

    play(scenario, transfer=TransferConfig(transports=("tcp",)))


class Stalling(ScriptedOwner):
    """An owner that sends everything but the last piece."""

    def answer(self, envelope: Envelope) -> None:
        message = envelope.message
        last = isinstance(message, ReadRegion) and message.offset_bytes + message.length_bytes > len(self.slab.data)
        self.stalls = last
        super().answer(envelope)


def test_a_step_during_a_switch_to_another_read_is_discarded(
    play: Play, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first read delivers damaged data and the second read sound data. The step reads some of both."""

    async def scenario(stage: Any) -> None:
        patience(monkeypatch, LONG_S)
        monkeypatch.setattr(speeds, "HEDGE_FLOOR_S", 0.05)
        monkeypatch.setattr(sources, "PIECE_BYTES", 4096)
        slab = models.slabs["one"]
        data = memoryview(bytes(byte ^ 1 for byte in slab.data))
        owner = Stalling(stage.network.bus("engine-1", ToEngine), Slab(slab.header, data, slab.version))
        stage.beside(owner.serve())
        stage.holders = (owner.holder(),)
        stage.store.open.clear()
        in_step = threading.Event()
        wait = Gate.wait

        def waits(self: Gate, layer: int) -> None:
            in_step.set()
            wait(self, layer)

        monkeypatch.setattr(Gate, "wait", waits)
        await stage.admit("early", "one")
        await stage.until(in_step.is_set)
        stage.store.open.set()
        await stage.finished("early")
        assert stage.tokens["early"] == models.expected("one", 8)
        await stage.fresh_load()
        assert (stage.counters.early_starts, stage.counters.early_starts_in_vain, stage.counters.leaks) == (1, 1, 0)
        assert [read.source for read in stage.counters.reads if read.reads] == ["store"]

    play(scenario, transfer=TransferConfig(transports=("tcp",)))


def test_a_request_fails_without_a_token_if_all_copies_are_damaged(
    play: Play, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Any) -> None:
        patience(monkeypatch, 0.001)
        stage.store.slabs[models.refs["one"].version] = damaged(models.slabs["one"])
        await stage.admit("hurt", "one")
        await stage.finished("hurt")
        assert stage.failed["hurt"].code == "adapter_unavailable"
        assert stage.tokens["hurt"] == []
        await stage.admit("base", tokens=4)
        await stage.finished("base")
        assert stage.tokens["base"] == models.expected("", 4)
        load = await stage.fresh_load()
        assert (stage.counters.leaks, load.adapters.loading) == (0, ())
        assert load.memory.pool_free_bytes == stage.capabilities.pool_bytes

    play(scenario)


def test_a_runner_with_steps_ahead_uses_only_complete_slabs(play: Play, models: Any) -> None:
    async def scenario(stage: Any) -> None:
        await stage.admit("late", "one")
        await stage.finished("late")
        assert stage.tokens["late"] == models.expected("one", 8)
        assert (await stage.fresh_counters()).early_starts == 0

    play(scenario, steps_ahead=1)
