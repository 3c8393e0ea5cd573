"""Chooses the implementation by device. Only what is used is imported: the CPU's needs numba, the GPU's triton."""

from importlib import import_module
from typing import Any

import torch

MODULES_BY_DEVICE = {"cpu": "loraserve.kernels.lora.cpu", "cuda": "loraserve.kernels.lora.gpu"}


def implementation(device: torch.device | str) -> Any:
    """The module whose ``add_lora`` computes on this device. Raises KeyError where there is none.

    It is asked once, not at every call: what it returns is called without a detour.
    """
    return import_module(MODULES_BY_DEVICE[torch.device(device).type])
