"""The cost model of steps and adapter loads. Router, planner and simulator predict times with it.

The time of a step is linear in the amounts that it reads and computes. The initial coefficients come from a profile.
Measurements of the engines then correct them.
"""

from math import inf, isfinite
from typing import Literal

import msgspec

from loraserve.messages import MeanStep, MeasuredSpeed

LEARNING_RATE = 0.1
"""Largest share of a prediction error that one measurement corrects. It is small: reported means are smoothed."""
LARGEST_SURPRISE = 4.0
"""Ratios of measured to predicted time are limited to this factor and its inverse, to bound the effect of outliers."""


class StepShape(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The contents of a step that determine its time.

    ``kv_tokens`` counts the pairs of a decoding sequence and a context token to which it attends, ``prefill_kv_tokens``
    the pairs of a prefill token and a context token. ``slab_bytes`` is the total size of the distinct adapters.
    ``rank_tokens`` is the sum of the adapter ranks of all tokens. ``max_rank`` is the largest rank.
    """

    decode_sequences: float = 0
    kv_tokens: float = 0
    prefill_tokens: float = 0
    prefill_kv_tokens: float = 0
    slab_bytes: float = 0
    rank_tokens: float = 0
    max_rank: int = 0


def mean_step(shape: StepShape, duration_s: float) -> MeanStep:
    """Return the MeanStep of identical steps of this shape and duration."""
    return MeanStep(
        duration_s=duration_s,
        decode_sequences=shape.decode_sequences,
        kv_tokens=shape.kv_tokens,
        prefill_tokens=shape.prefill_tokens,
        prefill_kv_tokens=shape.prefill_kv_tokens,
        slab_bytes=shape.slab_bytes,
        rank_tokens=shape.rank_tokens,
        padded_prefill_tokens=shape.max_rank * shape.prefill_tokens,
        padded_decode_tokens=shape.max_rank * shape.decode_sequences,
    )


class CostModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Coefficients in seconds per unit. The time of a step is ``step_base_s`` plus the terms for its contents.

    ``lora`` selects the LoRA terms. ``exact`` counts the bytes of the distinct adapters and each token's own rank (this
    project's kernels). ``padded`` counts every token at the largest rank of the batch (S-LoRA's BGMV, Punica, vLLM).
    """

    step_base_s: float = 0.022
    sequence_s: float = 0.0025
    """Per decoding sequence in the step."""
    kv_token_s: float = 2e-7
    """Per context token to which a decoding sequence attends."""
    prefill_token_s: float = 0.002
    prefill_kv_token_s: float = 0.0
    """Per pair of a prefill token and a context token to which it attends."""
    lora: Literal["exact", "padded"] = "exact"
    slab_byte_s: float = 1e-10
    """Exact: per byte of the distinct adapters in the step. A step reads each adapter once."""
    rank_token_s: float = 5e-6
    """Exact: per token and unit of its adapter's rank."""
    padded_prefill_s: float = 5e-6
    """Padded: per prefill token and unit of the largest rank in the step."""
    padded_decode_s: float = 5e-6
    """Padded: per decoding sequence and unit of the largest rank in the step."""
    load_base_s: float = 0.005
    """Per load of any size, for the request, verification and installation."""
    load_byte_s: float = 2e-9

    def step_s(self, shape: StepShape) -> float:
        return (
            self.step_base_s
            + shape.decode_sequences * self.sequence_s
            + shape.kv_tokens * self.kv_token_s
            + shape.prefill_tokens * self.prefill_token_s
            + shape.prefill_kv_tokens * self.prefill_kv_token_s
            + self.lora_s(shape)
        )

    def lora_s(self, shape: StepShape) -> float:
        """Return the seconds that the adapters add to a step."""
        if self.lora == "padded":
            per_rank_s = shape.prefill_tokens * self.padded_prefill_s + shape.decode_sequences * self.padded_decode_s
            return shape.max_rank * per_rank_s
        return shape.slab_bytes * self.slab_byte_s + shape.rank_tokens * self.rank_token_s

    def load_s(self, slab_bytes: int) -> float:
        return self.load_base_s + slab_bytes * self.load_byte_s

    def observe(self, speed: MeasuredSpeed) -> "CostModel":
        """Return this model corrected by an engine's measurements. CostLearner passes each measurement once."""
        cost = self
        for step in (speed.decode_step, speed.prefill_step):
            if step is not None:
                cost = cost._observe_step(step)
        load = speed.load
        if load is not None and load.slab_bytes > 0 and load.bytes_per_s > 0:
            terms = {"load_base_s": cost.load_base_s, "load_byte_s": load.slab_bytes * cost.load_byte_s}
            cost = cost._corrected(terms, load.slab_bytes / load.bytes_per_s, "load_byte_s", load.slab_bytes)
        return cost

    def _observe_step(self, step: MeanStep) -> "CostModel":
        """Return this model corrected by a mean step: all terms, or only the prefill terms while these are 0."""
        terms = {
            "step_base_s": self.step_base_s,
            "sequence_s": step.decode_sequences * self.sequence_s,
            "kv_token_s": step.kv_tokens * self.kv_token_s,
        }
        prefill = {
            "prefill_token_s": step.prefill_tokens * self.prefill_token_s,
            "prefill_kv_token_s": step.prefill_kv_tokens * self.prefill_kv_token_s,
        }
        if self.lora == "padded":
            terms["padded_decode_s"] = step.padded_decode_tokens * self.padded_decode_s
            prefill["padded_prefill_s"] = step.padded_prefill_tokens * self.padded_prefill_s
        else:
            terms["slab_byte_s"] = step.slab_bytes * self.slab_byte_s
            terms["rank_token_s"] = step.rank_tokens * self.rank_token_s
        if step.prefill_tokens > 0 and sum(prefill.values()) <= 0:
            # The time that the other terms do not explain is due to prefill. Only the prefill terms are changed.
            rest_s = step.duration_s - sum(terms.values())
            return self._corrected(prefill, rest_s, "prefill_token_s", step.prefill_tokens)
        return self._corrected({**terms, **prefill}, step.duration_s, "step_base_s", 1.0)

    def _corrected(self, terms: dict[str, float], measured_s: float, unknown: str, unknown_units: float) -> "CostModel":
        """Return a model that predicts ``measured_s`` better. ``terms`` maps coefficients to predicted seconds.

        The relative change of a coefficient is proportional to its term. If all terms are 0, coefficient ``unknown``
        becomes LEARNING_RATE * ``measured_s / unknown_units``. Negative, infinite or NaN measurements have no effect.
        """
        if not 0 <= measured_s < inf:
            return self
        predicted_s = sum(terms.values())
        if predicted_s <= 0:
            changes = {unknown: LEARNING_RATE * measured_s / unknown_units}
        else:
            surprise = _bounded(measured_s / predicted_s) - 1
            changes = {
                name: getattr(self, name) * (1 + LEARNING_RATE * surprise * term / predicted_s)
                for name, term in terms.items()
            }
        return msgspec.structs.replace(self, **changes) if all(map(isfinite, changes.values())) else self


def _bounded(ratio: float) -> float:
    return min(max(ratio, 1 / LARGEST_SURPRISE), LARGEST_SURPRISE)
