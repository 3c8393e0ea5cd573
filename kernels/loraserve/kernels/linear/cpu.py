"""y = x W' + b on the CPU with fp16 weights, float32 activations and float32 sums.

Weights are packed into tiles of output columns, so that reading a tile is one stream of memory and a register of
weights serves many tokens. Every output is summed over the inputs one after the other, beginning with the bias: a row
of y has the same bits whatever the number of rows and of threads.
"""

import torch

from loraserve.kernels.dense import assert_dense
from loraserve.kernels.linear.cpu_kernels import LINEAR, TILE
from loraserve.kernels.workers import run

SHARE_WORK_ELEMENTS = 50_000
"""Weights times tokens from which a second thread brings more than calling it costs."""


class PackedWeight:
    """A weight [out, in] as fp16 tiles [ceil(out / TILE), in, TILE], with its bias; columns beyond ``out`` are zero."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """``weight`` [out, in] and ``bias`` [out] of any dtype; what fp16 cannot hold becomes infinite."""
        self.out_features, self.in_features = weight.shape
        tiles = -(-self.out_features // TILE)
        padded = torch.zeros(tiles * TILE, self.in_features, dtype=torch.float16)
        padded[: self.out_features] = weight
        self.tiles = padded.view(tiles, TILE, self.in_features).transpose(1, 2).contiguous()
        self.bias = torch.zeros(tiles * TILE, dtype=torch.float32)
        if bias is not None:
            self.bias[: self.out_features] = bias


def linear(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """``x`` dense float32 [tokens, in]; returns float32 [tokens, out]."""
    tokens = x.shape[0]
    assert_dense(x, (tokens, weight.in_features))
    y = torch.empty(tokens, weight.out_features)
    if tokens == 0:  # a step of unfinished prompts wants no logits
        return y
    run(
        LINEAR,
        tokens * weight.tiles.numel() > SHARE_WORK_ELEMENTS,
        y.data_ptr(),
        x.data_ptr(),
        weight.tiles.data_ptr(),
        weight.bias.data_ptr(),
        tokens,
        weight.in_features,
        weight.out_features,
    )
    return y


def warm_up() -> None:
    """Compile, or load from the cache."""
    LINEAR.warm_up()
