"""What the engine asks of a model runner, whatever device it computes on."""

from typing import Protocol, runtime_checkable

import msgspec

from loraserve.adapter.format import SlabHeader
from loraserve.engine.loading.arrival import Arrival
from loraserve.engine.loading.memory import PoolMemory
from loraserve.engine.schedule.events import StepBatch, StepResult


class DeviceLost(Exception):
    """The device computes nothing any more, whatever it is asked: only a new process can use it again."""


class PendingStep(Protocol):
    """A step that was handed to a runner."""

    def result(self) -> StepResult:
        """Waits until the step is done; raises what kept it from being computed, DeviceLost where that will stay."""
        ...


class ComputedStep(msgspec.Struct, frozen=True):
    """The PendingStep of a runner that computes in ``submit``."""

    step: StepResult

    def result(self) -> StepResult:
        return self.step


class Runner(Protocol):
    """The model on one device, with its KV cache and its adapter pool.

    ``submit`` belongs to one thread, ``result`` of what it returns to one thread, which may be another; results are
    asked for in the order of the steps. ``install`` and ``remove`` may be called from a third for slots that no step in
    flight uses, and ``pool`` may be written by another outside the extents in use.
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
        """Begin a step, which computes after those before it. May raise what ``result`` may.

        A failed step does not fail the steps after it: each is computed, or fails, by itself. A PENDING_TOKEN that
        refers to a failed step may be any token, as its result is not used.
        """
        ...

    @property
    def pool(self) -> PoolMemory: ...

    def install(self, slot: int, header: SlabHeader, base_elements: int) -> None:
        """Tokens of ``slot`` use the slab that lies at ``base_elements`` of the pool from now on.

        Raises ValueError where the slab cannot be used.
        """
        ...

    def remove(self, slot: int) -> None:
        """Tokens of ``slot`` compute as the base model from now on."""
        ...


@runtime_checkable
class LayeredRunner(Runner, Protocol):
    """A Runner whose steps can use the first layers of a slab before the last are there, and say who was late."""

    def arrive(self, slot: int, header: SlabHeader, base_elements: int, arrival: Arrival) -> None:
        """As ``install``, of a slab that is being read: until that is called, steps look at ``arrival`` for each layer.

        May be called again for another read of the same slab to the same place, also while steps use it.
        """
        ...
