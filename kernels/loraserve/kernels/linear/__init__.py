"""Products with the model's own weights, kept as fp16: half the bytes of float32, with float32 sums."""

from loraserve.kernels.linear.cpu import PackedWeight, linear, warm_up

__all__ = ["PackedWeight", "linear", "warm_up"]
