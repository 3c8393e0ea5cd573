"""Rotary position embedding: the angles, once for all positions."""

import math

import torch

from loraserve.engine.model.config import Rope


def rotary_tables(rope: Rope, head_dim: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, float32 [positions, head_dim / 2] each."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), _inverse_frequencies(rope, head_dim))
    return angles.cos(), angles.sin()


def _inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Llama 3.1's scaling: long waves are stretched by ``factor``, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_positions / wavelengths
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies
