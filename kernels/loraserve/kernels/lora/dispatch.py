"""Chooses the implementation once, by device and by what is installed."""

from loraserve.kernels.lora.cpu import add_lora, warm_up

__all__ = ["add_lora", "warm_up"]
