"""A profile from bytes and FLOPs: what a model costs on a GPU that nobody has run it on. Pure arithmetic.

A step reads the weights once, each sequence's KV once, and the adapters as the LoRA kernels do; it computes two FLOPs
for each weight and token. Launches are not counted (CUDA graphs), nor is sampling.
"""

from collections.abc import Mapping
from typing import Literal

from loraserve.cost.hardware import Hardware
from loraserve.cost.model import CostModel
from loraserve.cost.profile import Efficiency, EngineShape, Profile
from loraserve.model_shape import MODULES, ModelShape

ITEM_BYTES = 2
"""bfloat16 weights, KV and adapters."""
DERIVED_ON = "2026-12-01"

# The engine's defaults (config.py).
MEMORY_FRACTION = 0.9
POOL_FRACTION = 0.3
BLOCK_TOKENS = 16
# Not the engine's, which are for a CPU.
MAX_RUNNING = 256
MAX_STEP_TOKENS = 2048
"""vLLM's usual default (max_num_batched_tokens)."""
MAX_MODEL_TOKENS = 32768
MIB = 1 << 20


def derive_profile(
    shape: ModelShape,
    hardware: Hardware,
    efficiencies: Mapping[str, Efficiency],
    lora: Literal["exact", "padded"],
    model: str = "",
) -> Profile:
    """The profile of ``shape`` on ``hardware``, in bfloat16; ``efficiencies`` as ``efficiencies_of`` names them.

    Raises KeyError where one is missing.
    """
    value = {name: efficiency.value for name, efficiency in efficiencies.items()}
    return Profile(
        model=model,
        shape=shape,
        hardware=hardware.name,
        date=DERIVED_ON,
        origin="derived",
        cost=_cost(shape, hardware, value, lora),
        engine=_engine(shape, hardware),
        efficiencies=dict(efficiencies),
    )


def _cost(
    shape: ModelShape, hardware: Hardware, value: Mapping[str, float], lora: Literal["exact", "padded"]
) -> CostModel:
    bandwidth = hardware.hbm_bytes_per_s * value["memory_bandwidth"]
    exact_bandwidth = hardware.hbm_bytes_per_s * value["exact_lora_bandwidth"]
    padded_bandwidth = hardware.hbm_bytes_per_s * value["padded_lora_bandwidth"]
    linear_flops = hardware.bf16_flops * value["linear_flops"]
    rank_unit_flops = 2 * rank_elements(shape)

    step_base_s = read_bytes(shape) / bandwidth
    activations_s = lora_activation_bytes(shape) / (exact_bandwidth if lora == "exact" else padded_bandwidth)
    return CostModel(
        step_base_s=step_base_s,
        sequence_s=_beside_the_weights(decode_flops(shape) / linear_flops, step_base_s) + activations_s,
        kv_token_s=kv_bytes(shape) / bandwidth,
        prefill_token_s=prefill_flops(shape) / linear_flops + activations_s,
        prefill_kv_token_s=attention_flops(shape) / (hardware.bf16_flops * value["attention_flops"]),
        lora=lora,
        slab_byte_s=1 / exact_bandwidth,
        rank_token_s=rank_unit_flops / (hardware.bf16_flops * value["exact_lora_flops"]),
        padded_prefill_s=rank_unit_flops / (hardware.bf16_flops * value["padded_lora_flops"]),
        padded_decode_s=rank_elements(shape) * ITEM_BYTES / padded_bandwidth,
        load_base_s=value["load_base_s"],
        load_byte_s=_load_byte_s(shape, hardware, value),
    )


def _load_byte_s(shape: ModelShape, hardware: Hardware, value: Mapping[str, float]) -> float:
    """A load takes what the slower of link and digests takes, and of the faster what nothing goes on beside.

    Threads verify a layer each, read back from the GPU, while later layers come: the digests of the last layer are
    behind the link, or the link fills all threads once before they are what everything waits for. Both are the share
    that as many layers as there are threads have of the slab.
    """
    link_byte_s = 1 / (min(hardware.host_bytes_per_s, hardware.nic_bytes_per_s) * value["link"])
    thread_byte_s = 1 / value["digest_bytes_per_s"] + 1 / (hardware.host_bytes_per_s * value["link"])
    layers_at_once = min(value["digest_threads"], shape.layers)
    faster, slower = sorted((link_byte_s, thread_byte_s / layers_at_once))
    return slower + faster * layers_at_once / shape.layers


def _beside_the_weights(flops_s: float, step_base_s: float) -> float:
    """Return the seconds that a decoding sequence adds to a step.

    A step computes while it reads weights, so few sequences add nothing and many add their FLOPs. The linear model uses
    the line from none to the most that run.
    """
    return max(0.0, flops_s - step_base_s / MAX_RUNNING)


def layer_elements(shape: ModelShape) -> int:
    """Weights of one layer's linears."""
    return sum(shape.in_features(module) * sum(shape.out_features(module)) for module in MODULES)


def read_bytes(shape: ModelShape) -> int:
    """What every step reads of the weights: all linears and the output head, but no more than rows of the embedding."""
    return (shape.layers * layer_elements(shape) + shape.vocab * shape.hidden) * ITEM_BYTES


def weight_bytes(shape: ModelShape) -> int:
    """What the weights take, embedding and output head apart."""
    return read_bytes(shape) + shape.vocab * shape.hidden * ITEM_BYTES


def prefill_flops(shape: ModelShape) -> int:
    """Of a prefill token, its attention apart: the output head is for the last token only."""
    return 2 * shape.layers * layer_elements(shape)


def decode_flops(shape: ModelShape) -> int:
    """Of a decoding sequence, its attention apart."""
    return prefill_flops(shape) + 2 * shape.vocab * shape.hidden


def attention_flops(shape: ModelShape) -> int:
    """Of a pair of a token and one that it attends to: a product with its key, and one with its value."""
    return 4 * shape.layers * shape.heads * shape.head_dim


def kv_bytes(shape: ModelShape) -> int:
    """Of one token: key and value."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * ITEM_BYTES


def rank_elements(shape: ModelShape) -> int:
    """Elements of a slab for each unit of rank, in every projection (adapter/format.py)."""
    return shape.layers * sum(
        len(shape.out_features(module)) * shape.in_features(module) + sum(shape.out_features(module))
        for module in MODULES
    )


def lora_activation_bytes(shape: ModelShape) -> int:
    """What LoRA moves for a token of any rank: x read by shrink, y read and written by expand, in every module.

    Each token is taken to have an adapter, as in the traffic that this is for.
    """
    return (
        shape.layers
        * ITEM_BYTES
        * sum(shape.in_features(module) + 2 * sum(shape.out_features(module)) for module in MODULES)
    )


def _engine(shape: ModelShape, hardware: Hardware) -> EngineShape:
    """Memory is divided as services/loraserve/engine/cuda/memory.py does."""
    left = int(hardware.hbm_bytes * MEMORY_FRACTION) - weight_bytes(shape) - _step_bytes(shape)
    pool_bytes = int(left * POOL_FRACTION) // MIB * MIB
    return EngineShape(
        kv_blocks=(left - pool_bytes) // (BLOCK_TOKENS * kv_bytes(shape)),
        block_tokens=BLOCK_TOKENS,
        pool_bytes=pool_bytes,
        max_running=MAX_RUNNING,
        max_step_tokens=MAX_STEP_TOKENS,
        max_model_tokens=MAX_MODEL_TOKENS,
        slab_bytes_per_rank=rank_elements(shape) * ITEM_BYTES,
        kv_bytes_per_token=kv_bytes(shape),
    )


def _step_bytes(shape: ModelShape) -> int:
    """What the largest step holds at a time: the outputs of one layer's linears, and float32 logits."""
    outputs = sum(sum(shape.out_features(module)) for module in MODULES) + 2 * shape.hidden + shape.ffn
    return MAX_STEP_TOKENS * outputs * ITEM_BYTES + MAX_RUNNING * shape.vocab * 4
