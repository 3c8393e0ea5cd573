"""The interface between the engine and the model runner of a device."""

from typing import Protocol, runtime_checkable

import msgspec

from loraserve.adapter.format import SlabHeader
from loraserve.engine.loading.arrival import Arrival
from loraserve.engine.loading.memory import PoolMemory
from loraserve.engine.schedule.events import StepBatch, StepResult


class DeviceLostError(Exception):
    """The device is unusable in this process. Only a new process can use it again."""


class PendingStep(Protocol):
    def result(self) -> StepResult:
        """Wait for the step and return its result.

        Raises the error that the step failed with. It is DeviceLostError if all later steps would fail too.
        """
        ...


class ComputedStep(msgspec.Struct, frozen=True):
    """A PendingStep that is already complete."""

    step: StepResult

    def result(self) -> StepResult:
        return self.step


class Runner(Protocol):
    """The model on one device, with its KV cache and its adapter pool.

    One thread calls ``submit``. The same or another thread calls ``result`` of the returned steps in order. A third
    thread may call ``install`` and ``remove`` for slots that no step in flight uses. A fourth thread may write to
    those extents of ``pool`` that no step in flight reads.
    """

    @property
    def steps_ahead(self) -> int:
        """Number of steps accepted beyond the oldest unfinished one. The runner resolves PENDING_TOKEN in them."""
        ...

    @property
    def kv_blocks(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def weights_backend(self) -> str: ...

    def submit(self, batch: StepBatch) -> PendingStep:
        """Start a step, which runs after all earlier steps. May raise the same errors as ``PendingStep.result``.

        A failed step does not make later steps fail. If PENDING_TOKEN refers to a failed step, the runner may use any
        token, because the engine discards the result.
        """
        ...

    @property
    def pool(self) -> PoolMemory: ...

    def install(self, slot: int, header: SlabHeader, base_elements: int) -> None:
        """Make later steps use the slab at element ``base_elements`` of the pool for tokens of ``slot``.

        Raises ValueError if the slab does not fit the model or the settings.
        """
        ...

    def remove(self, slot: int) -> None:
        """Make later steps compute tokens of ``slot`` without an adapter."""
        ...


@runtime_checkable
class LayeredRunner(Runner, Protocol):
    """A Runner whose steps can use the first layers of a slab while later layers are still loading.

    Its step results list the requests whose step had to wait for a layer of their adapter.
    """

    def arrive(self, slot: int, header: SlabHeader, base_elements: int, arrival: Arrival) -> None:
        """Make later steps use a slab that is still loading for tokens of ``slot``.

        Until ``install`` is called, steps ask ``arrival`` whether each layer has arrived. May be called again, even
        while steps use the slot, if the same slab is read again to the same place.
        """
        ...
