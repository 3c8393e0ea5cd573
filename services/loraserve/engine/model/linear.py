"""Linear layers with the model's weights, in float32 or in fp16, which is several times faster on a CPU."""

from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional

from loraserve.errors import ConfigError
from loraserve.kernels.linear import PackedWeight, linear

Backend = Literal["float32", "fp16"]

FP16_MAX = 65504.0


class Linear:
    """Computes x [tokens, in] @ weight.T + bias. ``x`` must have the weight's dtype and device."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)


class Fp16Linear(Linear):
    """A Linear on the CPU with packed fp16 weights, float32 activations and float32 sums.

    The bits of an output row do not depend on the number of rows or threads.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._packed = PackedWeight(weight, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self._packed)


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None, backend: Backend) -> Linear:
    """Return a layer for ``backend``, or for float32 if a weight exceeds fp16's range. The inputs are float32."""
    if backend == "fp16" and weight.abs().max().item() <= FP16_MAX:
        return Fp16Linear(weight, bias)
    return Linear(weight, bias)


class CpuWeightForm:
    """Converts weights for the CPU engine. The embedding keeps its dtype. The decoder converts the rows it reads."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def embedding(self, weight: torch.Tensor) -> torch.Tensor:
        # Copy, because ``weight`` maps the file, which could change later.
        return weight.clone()

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return make_linear(weight, bias, self._backend)

    def tied_head(self, embedding: torch.Tensor) -> Linear:
        return make_linear(embedding.to(torch.float32, copy=True), None, self._backend)

    def vector(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


def can_run_fp16() -> bool:
    """Return whether the fp16 kernels compile on this machine and give the right result."""
    weight = torch.ones(8, 16)
    try:
        return torch.equal(Fp16Linear(weight, None)(torch.ones(2, 16)), torch.full((2, 8), 16.0))
    except Exception:
        return False


def pick_backend(
    setting: Literal["auto", "float32", "fp16", "bf16"], can_run_fp16: Callable[[], bool] = can_run_fp16
) -> Backend:
    """Return the backend for the setting ``engine.weights``. Raises ConfigError if this machine does not support it."""
    if setting == "float32":
        return "float32"
    if setting == "bf16":
        raise ConfigError("engine.weights=bf16 is for GPUs; set engine.weights to auto, fp16 or float32 on a CPU")
    if can_run_fp16():
        return "fp16"
    if setting == "fp16":
        raise ConfigError(
            "engine.weights=fp16: the fp16 kernels cannot be compiled for this processor; "
            "set engine.weights to auto or float32"
        )
    return "float32"
