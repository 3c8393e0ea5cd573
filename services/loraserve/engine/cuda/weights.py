"""The form in which weights compute on the GPU: one dtype for all products, norms in float32."""

import torch

from loraserve.config import EngineConfig
from loraserve.engine.model.linear import Linear
from loraserve.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
SLAB_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "float32": "float32"}


class DeviceForm:
    """A WeightForm: each tensor is rounded to ``dtype`` and moved as it is read, so that the host never holds all."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device

    def embedding(self, weight: torch.Tensor) -> torch.Tensor:
        return self._moved(weight)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return Linear(self._moved(weight), None if bias is None else self._moved(bias))

    def tied_head(self, embedding: torch.Tensor) -> Linear:
        return Linear(embedding, None)

    def vector(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self._device)

    def _moved(self, weight: torch.Tensor) -> torch.Tensor:
        moved = weight.to(self._device, self._dtype, copy=True)
        if self._dtype == torch.float16 and not bool(moved.isfinite().all()):
            raise ConfigError("engine.weights=fp16: the model has weights beyond 65504; use bf16 weights and slabs")
        return moved


def compute_dtype(engine: EngineConfig) -> str:
    """The key of DTYPES that ``engine.weights`` asks for; auto is the adapters' own.

    Raises ConfigError where weights and adapters would be of different dtypes: kernels multiply like with like.
    """
    if engine.weights == "auto":
        return next(name for name, slab in SLAB_DTYPES.items() if slab == engine.slab_dtype)
    if SLAB_DTYPES[engine.weights] != engine.slab_dtype:
        raise ConfigError(
            f"engine.weights={engine.weights} needs engine.slab_dtype={SLAB_DTYPES[engine.weights]} on a GPU, it is "
            f"{engine.slab_dtype}; set both alike, or engine.weights=auto"
        )
    return engine.weights
