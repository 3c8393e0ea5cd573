"""What a step, a load and a stream of requests cost: the one model that router, planner and simulator price with. Pure.

Linear in what a step reads and computes. The coefficients begin as those of a profile and follow what the engines
measure.
"""

from math import inf, isfinite
from typing import Literal

import msgspec

from loraserve.messages import MeanStep, MeasuredSpeed

LEARNING_RATE = 0.1
"""How far one report moves the coefficients towards what it says: reports are smoothed already, so slowly."""
LARGEST_SURPRISE = 4.0
"""A measurement further off than this factor counts as this far off: one odd step must not bend the model."""


class StepShape(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a step holds, as far as its time depends on it.

    ``kv_tokens``: context that decoding sequences attend to. ``prefill_kv_tokens``: the same of prefill tokens, summed
    over them (tokens times the mean of what each attends to). ``slab_bytes``: of the distinct adapters in it.
    ``rank_tokens``: the sum over its tokens of their adapters' ranks. ``max_rank``: the largest of these.
    """

    decode_sequences: float = 0
    kv_tokens: float = 0
    prefill_tokens: float = 0
    prefill_kv_tokens: float = 0
    slab_bytes: float = 0
    rank_tokens: float = 0
    max_rank: int = 0


def mean_step(shape: StepShape, duration_s: float) -> MeanStep:
    """As it is reported of steps that are all alike."""
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
    """Seconds per unit. A step costs ``step_base_s`` whatever it holds, and the rest for what it holds.

    What LoRA costs is priced in one of two ways. ``exact``: the bytes of the distinct adapters, and each token's own
    rank; our kernels. ``padded``: every token at the largest rank of the batch; S-LoRA's BGMV, Punica, vLLM.
    """

    step_base_s: float = 0.022
    sequence_s: float = 0.0025
    """Of each sequence that decodes in the step."""
    kv_token_s: float = 2e-7
    """Of each token of context that a decoding sequence attends to."""
    prefill_token_s: float = 0.002
    prefill_kv_token_s: float = 0.0
    """Of each pair of a prefill token and a token that it attends to."""
    lora: Literal["exact", "padded"] = "exact"
    slab_byte_s: float = 1e-10
    """Exact: of the bytes of the distinct adapters in the step: they are read once, whoever shares them."""
    rank_token_s: float = 5e-6
    """Exact: of each token times the rank of its adapter."""
    padded_prefill_s: float = 5e-6
    """Padded: of each prefill token times the largest rank in the step."""
    padded_decode_s: float = 5e-6
    """Padded: of each decoding sequence times the largest rank in the step."""
    load_base_s: float = 0.005
    """Of a load whatever its size: asking, verifying, installing."""
    load_byte_s: float = 2e-9

    def step_s(self, shape: StepShape) -> float:
        """One step."""
        return (
            self.step_base_s
            + shape.decode_sequences * self.sequence_s
            + shape.kv_tokens * self.kv_token_s
            + shape.prefill_tokens * self.prefill_token_s
            + shape.prefill_kv_tokens * self.prefill_kv_token_s
            + self.lora_s(shape)
        )

    def lora_s(self, shape: StepShape) -> float:
        """What its adapters add to a step."""
        if self.lora == "padded":
            per_rank_s = shape.prefill_tokens * self.padded_prefill_s + shape.decode_sequences * self.padded_decode_s
            return shape.max_rank * per_rank_s
        return shape.slab_bytes * self.slab_byte_s + shape.rank_tokens * self.rank_token_s

    def load_s(self, slab_bytes: int) -> float:
        """Bringing an absent adapter in."""
        return self.load_base_s + slab_bytes * self.load_byte_s

    def observe(self, speed: MeasuredSpeed) -> "CostModel":
        """Return this model moved towards what one engine measured. Call it once per measurement; see CostLearner."""
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
        """The whole of it: what decodes beside prefill is not the prefill's own time."""
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
            # What decode steps have taught is not moved for what only prefill can have taken.
            rest_s = step.duration_s - sum(terms.values())
            return self._corrected(prefill, rest_s, "prefill_token_s", step.prefill_tokens)
        return self._corrected({**terms, **prefill}, step.duration_s, "step_base_s", 1.0)

    def _corrected(self, terms: dict[str, float], measured_s: float, unknown: str, unknown_units: float) -> "CostModel":
        """The surprise in a measured time, blamed on each term by its share of the prediction.

        What is 0 has no share and stays 0; where all are, no factor leads anywhere, and ``unknown``, of which there
        were ``unknown_units``, is what there is to learn. What no clock can have measured teaches nothing.
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
