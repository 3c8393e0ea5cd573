"""A hardware profile for simulations in tests, with small round numbers."""

from loraserve.cost import CostModel
from loraserve.cost.profile import EngineShape, Profile
from loraserve.model_shape import ModelShape


def small_profile() -> Profile:
    return Profile(
        model="small",
        shape=ModelShape(layers=2, hidden=64, heads=2, kv_heads=1, head_dim=32, ffn=128, vocab=100),
        hardware="paper",
        date="2026-01-01",
        origin="measured",
        cost=CostModel(
            step_base_s=0.01,
            sequence_s=1e-4,
            kv_token_s=1e-7,
            prefill_token_s=1e-4,
            lora="padded",
            padded_decode_s=3e-6,
            padded_prefill_s=1e-7,
            slab_byte_s=1e-12,
            rank_token_s=1e-7,
            load_base_s=0.005,
            load_byte_s=1e-9,
        ),
        engine=EngineShape(
            kv_blocks=4000,
            block_tokens=16,
            pool_bytes=256 << 20,
            max_running=32,
            max_step_tokens=512,
            max_model_tokens=4096,
            slab_bytes_per_rank=1 << 16,
        ),
    )
