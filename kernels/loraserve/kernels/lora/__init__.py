"""Batched LoRA for adapters of different ranks. No rank is padded to the largest of the batch.

The package exports the CPU implementation. ``implementation`` returns the module for a device. Each module is imported
at first use, because the CPU module needs numba and the GPU module needs triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from loraserve.kernels.lora.batch import NO_ADAPTER, LoraBatch, plan_batch
from loraserve.kernels.lora.tables import AdapterTables

if TYPE_CHECKING:
    from loraserve.kernels.lora.cpu import add_lora, warm_up

__all__ = ["NO_ADAPTER", "AdapterTables", "LoraBatch", "add_lora", "implementation", "plan_batch", "warm_up"]

MODULES_BY_DEVICE = {"cpu": "loraserve.kernels.lora.cpu", "cuda": "loraserve.kernels.lora.gpu"}


def implementation(device: torch.device | str) -> Any:
    """Return the module whose ``add_lora`` runs on this device. Raises KeyError if the device type is not supported."""
    return import_module(MODULES_BY_DEVICE[torch.device(device).type])


def __getattr__(name: str) -> Any:
    if name in ("add_lora", "warm_up"):
        return getattr(implementation("cpu"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
