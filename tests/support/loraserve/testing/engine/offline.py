"""The engine without its process: the real scheduler and the real runner in one thread, without a bus.

Benchmarks use it, and tests of the engine's outputs. A load copies a packed slab into the pool and is then complete.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import msgspec

from loraserve.adapter.format import ITEM_BYTES
from loraserve.adapter.pack import Slab
from loraserve.config import Config
from loraserve.engine.compute.protocol import PendingStep, Runner
from loraserve.engine.schedule.events import (
    AdapterLoaded,
    Emit,
    Event,
    EvictAdapter,
    Instruction,
    LoadAdapter,
    Reject,
    RequestArrived,
    RunStep,
    StepBatch,
    StepDone,
)
from loraserve.engine.schedule.scheduler import Scheduler
from loraserve.engine.setup import build_runner, scheduler_limits
from loraserve.messages import AdapterRef, Admit, SamplingParams, TokenDelta


class OfflineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request. ``adapter`` is a name that the engine was given, "" for the base model.

    The last ``generated`` tokens of ``prompt`` are output of an earlier attempt.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    adapter: str = ""
    generated: int = 0


class OfflineOutput(msgspec.Struct, kw_only=True):
    """The outcome of a request.

    ``times_s`` has the time of each token since ``generate`` was called, ``error`` the "code: message" of a refusal.
    """

    tokens: list[int] = msgspec.field(default_factory=list)
    times_s: list[float] = msgspec.field(default_factory=list)
    finish: str | None = None
    cached_tokens: int = 0
    error: str = ""


class StepRecord(msgspec.Struct, frozen=True):
    """One step: its sequences, the tokens it computed, and its duration as the runner measured it."""

    sequences: int
    tokens: int
    duration_s: float


class OfflineEngine:
    """One engine with the model of ``config.model.path`` and adapters by name.

    ``generate`` may be called repeatedly; KV blocks, prefix cache and resident adapters stay between calls.
    ``steps`` records every step of the last call. Not thread-safe.
    """

    def __init__(self, config: Config, adapters: Mapping[str, Slab], runner: Runner | None = None) -> None:
        """Load and warm up the model unless a ``runner`` is given. Raises ConfigError that names the wrong setting.

        A ``runner`` serves one engine at a time: the slots of its adapters are this engine's from now on.
        """
        self.runner: Runner = runner or build_runner(config, lambda text: None)
        self.scheduler = Scheduler(scheduler_limits(config, self.runner))
        self.steps: list[StepRecord] = []
        self._slabs = {slab.version: slab for slab in adapters.values()}
        self._references = {name: adapter_reference(name, slab) for name, slab in adapters.items()}
        self._pending: deque[Instruction] = deque()
        self._steps: deque[tuple[StepBatch, PendingStep]] = deque()
        self._outputs: dict[str, OfflineOutput] = {}
        self._started_s = 0.0
        self._requests = 0

    def generate(
        self, requests: Sequence[OfflineRequest], before_step: Callable[[StepBatch], None] | None = None
    ) -> list[OfflineOutput]:
        """Run requests that arrive together to their ends and return their outputs in the same order.

        ``before_step`` is called with every batch before it is computed. Raises ValueError on an unknown adapter name.
        """
        admits = [self._admit(request) for request in requests]
        self.steps = []
        self._outputs = {admit.request_id: OfflineOutput() for admit in admits}
        self._started_s = time.monotonic()
        for admit in admits:
            self._handle(RequestArrived(admit))
        while self._pending or self._steps:
            if self._pending:
                self._execute(self._pending.popleft(), before_step)
            else:
                self._end_step()
        assert self.scheduler.is_idle, "the scheduler stopped with requests unfinished"
        return [self._outputs[admit.request_id] for admit in admits]

    def _admit(self, request: OfflineRequest) -> Admit:
        if request.adapter and request.adapter not in self._references:
            raise ValueError(f"adapter {request.adapter!r} is not one of {sorted(self._references)}")
        self._requests += 1
        return Admit(
            request_id=f"offline-{self._requests}",
            gateway="",
            prompt_tokens=request.prompt,
            sampling=request.sampling,
            adapter=self._references.get(request.adapter),
            generated=request.generated,
        )

    def _handle(self, event: Event) -> None:
        self._pending.extend(self.scheduler.handle(event, time.monotonic()))

    def _execute(self, instruction: Instruction, before_step: Callable[[StepBatch], None] | None) -> None:
        match instruction:
            case RunStep(batch):
                if before_step is not None:
                    before_step(batch)
                self._begin_step(batch)
            case LoadAdapter() as load:
                self._fill(load)
                self._handle(AdapterLoaded(load.adapter.version))
            case EvictAdapter(slot=slot):
                self.runner.remove(slot)
            case Emit(_, delta):
                self._record(delta)
            case Reject(request_id, _, code, message):
                self._outputs[request_id].error = f"{code}: {message}"

    def _begin_step(self, batch: StepBatch) -> None:
        self._steps.append((batch, self.runner.submit(batch)))
        if len(self._steps) > self.scheduler.limits.steps_ahead:
            self._end_step()

    def _end_step(self) -> None:
        batch, step = self._steps.popleft()
        result = step.result()
        tokens = sum(len(sequence.tokens) for sequence in batch.sequences)
        self.steps.append(StepRecord(len(batch.sequences), tokens, result.duration_s))
        self._handle(StepDone(result))

    def _fill(self, load: LoadAdapter) -> None:
        install_slab(self.runner, load.slot, self._slabs[load.adapter.version], load.offset_bytes)

    def _record(self, delta: TokenDelta) -> None:
        output = self._outputs[delta.request_id]
        output.tokens.extend(delta.tokens)
        output.times_s.extend([time.monotonic() - self._started_s] * len(delta.tokens))
        output.finish = delta.finish
        output.cached_tokens += delta.cached_tokens


def install_slab(runner: Runner, slot: int, slab: Slab, offset_bytes: int) -> None:
    """Copy a slab into the runner's pool and install it in a slot."""
    runner.pool.write(offset_bytes, slab.data)
    runner.install(slot, slab.header, offset_bytes // ITEM_BYTES[slab.header.dtype])


def adapter_reference(name: str, slab: Slab) -> AdapterRef:
    """Return the reference of an adapter."""
    return AdapterRef(name=name, version=slab.version, rank=slab.header.rank, slab_bytes=slab.header.slab_bytes)
