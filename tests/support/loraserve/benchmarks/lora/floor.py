"""The least time a step's LoRA may take: every byte that must move, once, at the memory's measured speed."""

from loraserve.benchmarks.lora.cases import Case
from loraserve.kernels.lora.batch import NO_ADAPTER
from loraserve.model_shape import MODULES, ModelShape

ITEM_BYTES = 2


def module_bytes(shape: ModelShape, module: str, case: Case) -> int:
    """A and B of each adapter of the step once; of each token with an adapter x read, y read and written."""
    k, out = shape.in_features(module), shape.out_features(module)
    tokens = sum(slot != NO_ADAPTER for slot in case.slots)
    weights = sum(case.used_ranks) * (len(out) * k + sum(out))
    return ITEM_BYTES * (weights + tokens * (k + 2 * sum(out)))


def layer_bytes(shape: ModelShape, case: Case) -> int:
    """Of all modules of a layer."""
    return sum(module_bytes(shape, module, case) for module in MODULES)


def milliseconds(size_bytes: int, bytes_per_s: float) -> float:
    """Time to move them."""
    return 1e3 * size_bytes / bytes_per_s
