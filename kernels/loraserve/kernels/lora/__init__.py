"""Mixed-rank batched LoRA: the cost of a batch is the sum over its own adapters' true ranks."""

from loraserve.kernels.lora.batch import NO_ADAPTER, LoraBatch, plan_batch
from loraserve.kernels.lora.dispatch import add_lora, warm_up
from loraserve.kernels.lora.tables import AdapterTables

__all__ = ["NO_ADAPTER", "AdapterTables", "LoraBatch", "add_lora", "plan_batch", "warm_up"]
