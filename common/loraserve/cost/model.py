"""What a step, a load and a stream of requests cost: the one model that router, planner and simulator price with. Pure.

Linear in what a step reads and computes. The coefficients begin as those of a profile and follow what the engines
measure.
"""

from math import isfinite
from typing import Literal

import msgspec

from loraserve.messages import EngineLoad

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

    def busy_share(
        self, prefill_tokens_per_s: float, decode_tokens_per_s: float, rank: int = 0, slab_bytes: int = 0
    ) -> float:
        """Share of one engine's time that this traffic takes, beside the steps' own base.

        Its slab is read once a step that has it, so that the bytes weigh on rare traffic and are shared by dense.
        Padded, it is priced at its own rank: what a larger one beside it costs it depends on where it is placed.
        """
        if self.lora == "padded":
            prefill_s = prefill_tokens_per_s * (self.prefill_token_s + rank * self.padded_prefill_s)
            return prefill_s + decode_tokens_per_s * (self.sequence_s + rank * self.padded_decode_s)
        step_s = self.step_s(StepShape(decode_sequences=1, slab_bytes=slab_bytes))
        steps_per_s = min(decode_tokens_per_s, 1 / step_s) if step_s > 0 else decode_tokens_per_s
        return (
            prefill_tokens_per_s * (self.prefill_token_s + rank * self.rank_token_s)
            + decode_tokens_per_s * (self.sequence_s + rank * self.rank_token_s)
            + steps_per_s * slab_bytes * self.slab_byte_s
        )

    def observe(self, load: EngineLoad) -> "CostModel":
        """This model, moved towards what one engine reports as measured."""
        changes = self._decode_changes(load) if load.running and load.decode_step_s > 0 else {}
        if load.prefill_tokens_per_s > 0:
            changes["prefill_token_s"] = _towards(self.prefill_token_s, 1 / load.prefill_tokens_per_s)
        if load.load_bytes_per_s > 0:
            changes["load_byte_s"] = _towards(self.load_byte_s, 1 / load.load_bytes_per_s)
        return msgspec.structs.replace(self, **changes) if changes else self

    def _decode_changes(self, load: EngineLoad) -> dict[str, float]:
        """The surprise in a decode step's time, blamed on each term by its share of the prediction.

        What is 0 has no share and stays 0; where all are, the step's base is what there is to learn.
        """
        terms = {
            "step_base_s": self.step_base_s,
            "sequence_s": load.running * self.sequence_s,
            "kv_token_s": (load.kv_blocks_total - load.kv_blocks_free) * load.block_tokens * self.kv_token_s,
            **self._lora_terms(load),
        }
        predicted_s = sum(terms.values())
        if predicted_s <= 0:
            return {"step_base_s": _towards(0.0, load.decode_step_s)}
        surprise = _bounded(load.decode_step_s / predicted_s) - 1
        return {
            name: getattr(self, name) * (1 + LEARNING_RATE * surprise * term / predicted_s)
            for name, term in terms.items()
        }

    def _lora_terms(self, load: EngineLoad) -> dict[str, float]:
        running = [adapter for adapter in load.resident if adapter.running]
        if self.lora == "padded":
            max_rank = max((adapter.rank for adapter in running), default=0)
            return {"padded_decode_s": load.running * max_rank * self.padded_decode_s}
        return {
            "slab_byte_s": sum(adapter.slab_bytes for adapter in running) * self.slab_byte_s,
            "rank_token_s": sum(adapter.running * adapter.rank for adapter in running) * self.rank_token_s,
        }


def _towards(old: float, measured: float) -> float:
    """From 0 no factor leads anywhere, so that a measurement counts by what it is."""
    if old <= 0:
        return LEARNING_RATE * measured if isfinite(measured) else 0.0
    return old * (1 + LEARNING_RATE * (_bounded(measured / old) - 1))


def _bounded(ratio: float) -> float:
    return min(max(ratio, 1 / LARGEST_SURPRISE), LARGEST_SURPRISE)
