"""What every CPU kernel asks of its operands."""

import torch


def assert_dense(tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Kernels index raw memory: anything but dense float32 of this shape would be read wrongly."""
    assert tensor.dtype == torch.float32, tensor.dtype
    assert tensor.is_contiguous(), tensor.stride()
    assert tensor.shape == shape, (tensor.shape, shape)
