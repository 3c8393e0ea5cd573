"""What the engine needs from a model runner on any device."""

from typing import Protocol, runtime_checkable

import msgspec

from loraserve.adapter.format import SlabHeader
from loraserve.engine.loading.arrival import Arrival
from loraserve.engine.loading.memory import PoolMemory
from loraserve.engine.schedule.events import StepBatch, StepResult


class DeviceLostError(Exception):
    """The device computes nothing any more. Only a new process can use it again."""


class PendingStep(Protocol):
    def result(self) -> StepResult:
        """Wait for the step and return its result.

        Raises the error that kept it from being computed, DeviceLostError if every later step would fail too.
        """
        ...


class ComputedStep(msgspec.Struct, frozen=True):
    """A PendingStep that is already done."""

    step: StepResult

    def result(self) -> StepResult:
        return self.step


class Runner(Protocol):
    """The model on one device, with its KV cache and its adapter pool.

    One thread calls ``submit``, and one, which may be another, calls ``result`` of what it returns, in the order of the
    steps. A third thread may call ``install`` and ``remove`` for slots that no step in flight uses, and another may
    write to ``pool`` outside the extents in use.
    """

    @property
    def steps_ahead(self) -> int:
        """How many steps are accepted before the oldest is done; the runner resolves PENDING_TOKEN in them."""
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
        """Start a step that is computed after those before it. May raise the errors of ``result``.

        A failed step does not fail the steps after it: each is computed, or fails, by itself. A PENDING_TOKEN that
        refers to a failed step may be any token, as its result is not used.
        """
        ...

    @property
    def pool(self) -> PoolMemory: ...

    def install(self, slot: int, header: SlabHeader, base_elements: int) -> None:
        """Use the slab at ``base_elements`` of the pool for tokens of ``slot`` from now on.

        Raises ValueError if the slab cannot be used.
        """
        ...

    def remove(self, slot: int) -> None:
        """Compute tokens of ``slot`` with the base model from now on."""
        ...


@runtime_checkable
class LayeredRunner(Runner, Protocol):
    """A Runner whose steps can use the first layers of a slab while the last are still being read.

    Its step results name the requests whose adapter was late for some layer.
    """

    def arrive(self, slot: int, header: SlabHeader, base_elements: int, arrival: Arrival) -> None:
        """Use a slab that is being read for tokens of ``slot``.

        Until ``install`` is called, steps ask ``arrival`` for each layer. May be called again for another read of the
        same slab to the same place, also while steps use it.
        """
        ...
