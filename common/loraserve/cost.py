"""What a step and a load will take: the one model that router, planner and simulator price with. Pure.

Linear in what the step reads and computes. The coefficients begin as rough values of a small CPU model and are
replaced, engine by engine, by what that engine measures and reports.
"""

import msgspec

from loraserve.messages import EngineLoad


class CostModel(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds per unit. ``decode_step_s`` is a step of one sequence without adapters."""

    decode_step_s: float = 0.03
    prefill_token_s: float = 0.002
    slab_byte_s: float = 4e-11
    """Of an adapter's bytes that one step reads."""
    load_byte_s: float = 2e-9
    load_s: float = 0.005
    """Of a load whatever its size: asking, verifying, installing."""

    def measured_by(self, load: EngineLoad) -> "CostModel":
        """This model with what the engine has measured itself."""
        return msgspec.structs.replace(
            self,
            decode_step_s=load.decode_step_s or self.decode_step_s,
            prefill_token_s=1 / load.prefill_tokens_per_s if load.prefill_tokens_per_s else self.prefill_token_s,
            load_byte_s=1 / load.load_bytes_per_s if load.load_bytes_per_s else self.load_byte_s,
        )

    def step_s(self, prefill_tokens: int, slab_bytes: int) -> float:
        """One step that computes these prefill tokens beside decoding, with distinct adapters of these bytes."""
        return self.decode_step_s + prefill_tokens * self.prefill_token_s + slab_bytes * self.slab_byte_s

    def load_adapter_s(self, slab_bytes: int) -> float:
        """Bringing an absent adapter in."""
        return self.load_s + slab_bytes * self.load_byte_s

    def token_weight(self, slab_bytes: int) -> float:
        """Cost of one token of an adapter relative to one of the base model, when it is alone in its batch."""
        return 1.0 + slab_bytes * self.slab_byte_s / self.decode_step_s


def save_cost(cost: CostModel) -> bytes:
    """As JSON."""
    return msgspec.json.format(msgspec.json.encode(cost))


def read_cost(data: bytes) -> CostModel:
    """Inverse of ``save_cost``. Raises msgspec.ValidationError on anything else."""
    return msgspec.json.decode(data, type=CostModel)
