"""Rates measured on this engine, smoothed. Pure."""

from math import inf

import msgspec

from loraserve.cost import StepShape, mean_step
from loraserve.messages import MeanStep

SMOOTHING = 0.1
"""Weight of the newest observation: ten steps set the picture, one slow step does not."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Fields are those of EngineLoad that are measured; 0 and None are not measured yet."""

    decode_step_s: float
    prefill_tokens_per_s: float
    load_bytes_per_s: float
    load_bytes: float
    loads: int
    decode_step: MeanStep | None
    decode_steps: int
    prefill_step: MeanStep | None
    prefill_steps: int


class Rates:
    """Amounts and the seconds that they took are smoothed each: a mean of rates would count short steps too much."""

    def __init__(self) -> None:
        self._decode_step: MeanStep | None = None
        self._prefill_step: MeanStep | None = None
        self._load_bytes = 0.0
        self._load_s = 0.0
        self._decode_steps = 0
        self._prefill_steps = 0
        self._loads = 0

    def measured(self) -> Measured:
        decode, prefill = self._decode_step, self._prefill_step
        return Measured(
            decode_step_s=decode.duration_s if decode else 0.0,
            prefill_tokens_per_s=prefill.prefill_tokens / prefill.duration_s if prefill else 0.0,
            load_bytes_per_s=self._load_bytes / self._load_s if self._load_s else 0.0,
            load_bytes=self._load_bytes,
            loads=self._loads,
            decode_step=decode,
            decode_steps=self._decode_steps,
            prefill_step=prefill,
            prefill_steps=self._prefill_steps,
        )

    def step_done(self, shape: StepShape, duration_s: float, times: int = 1) -> None:
        """Count one step, or ``times`` alike. Those with prefill say nothing about decoding alone."""
        if not 0 < duration_s < inf:
            return
        if shape.prefill_tokens:
            self._prefill_steps += times
            self._prefill_step = _smooth(self._prefill_step, mean_step(shape, duration_s), times)
        else:
            self._decode_steps += times
            self._decode_step = _smooth(self._decode_step, mean_step(shape, duration_s), times)

    def load_done(self, slab_bytes: int, own_s: float) -> None:
        """Count one finished load. ``own_s``: without what it waited for others on the link."""
        if not 0 < own_s < inf:
            return
        first = not self._loads
        self._loads += 1
        self._load_bytes = float(slab_bytes) if first else _towards(self._load_bytes, slab_bytes)
        self._load_s = own_s if first else _towards(self._load_s, own_s)


def _smooth(old: MeanStep | None, new: MeanStep, times: int) -> MeanStep:
    if old is None:
        return new
    fields = MeanStep.__struct_fields__
    return MeanStep(**{name: _towards(getattr(old, name), getattr(new, name), times) for name in fields})


def _towards(old: float, new: float, times: int = 1) -> float:
    return new + (1 - SMOOTHING) ** times * (old - new)
