"""Mixed-rank batched LoRA: the cost of a batch is the sum over its own adapters' true ranks.

``add_lora`` and ``warm_up`` are the CPU's and are imported when first asked for; ``implementation`` has the GPU's too.
"""

from typing import TYPE_CHECKING, Any

from loraserve.kernels.lora.batch import NO_ADAPTER, LoraBatch, plan_batch
from loraserve.kernels.lora.dispatch import implementation
from loraserve.kernels.lora.tables import AdapterTables

if TYPE_CHECKING:
    from loraserve.kernels.lora.cpu import add_lora, warm_up

__all__ = ["NO_ADAPTER", "AdapterTables", "LoraBatch", "add_lora", "implementation", "plan_batch", "warm_up"]


def __getattr__(name: str) -> Any:
    if name in ("add_lora", "warm_up"):
        return getattr(implementation("cpu"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
