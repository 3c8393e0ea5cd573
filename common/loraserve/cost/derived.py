"""Derives a cost profile for a GPU from datasheet figures, bytes and FLOPs, without running the model on it.

A step reads the weights once and each sequence's KV once. LoRA kernels read each adapter once (``exact``) or once per
decoding sequence (``padded``). Steps compute two FLOPs per weight and token. Kernel launches and sampling are ignored.
"""

from collections.abc import Mapping
from typing import Literal

from loraserve.cost.hardware import Hardware
from loraserve.cost.model import CostModel
from loraserve.cost.profile import Efficiency, EngineShape, Profile
from loraserve.model_shape import MODULES, ModelShape

ITEM_BYTES = 2
"""Weights, KV and adapters are bfloat16."""
DERIVED_ON = "2026-12-01"

# Defaults of EngineConfig.
MEMORY_FRACTION = 0.9
POOL_FRACTION = 0.3
BLOCK_TOKENS = 16
# Values for a GPU. The defaults of EngineConfig are for a CPU.
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
    """Return the cost profile of a bfloat16 model of ``shape`` on ``hardware``, with LoRA kernels of kind ``lora``.

    ``find_efficiencies`` provides ``efficiencies``. Raises KeyError if one is missing.
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
        sequence_s=_sequence_s(decode_flops(shape) / linear_flops, step_base_s) + activations_s,
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
    """Return the seconds per byte of a load: those of its slower stage, plus the time when only the faster stage runs.

    Layers are transferred to the GPU. Then threads read them back and verify them, each one layer at a time. If the
    transfer is faster, it runs alone for the first layers. If the verification is faster, it runs alone for the last
    layers. In both cases these are as many layers as threads.
    """
    link_byte_s = 1 / (min(hardware.host_bytes_per_s, hardware.nic_bytes_per_s) * value["link"])
    thread_byte_s = 1 / value["digest_bytes_per_s"] + 1 / (hardware.host_bytes_per_s * value["link"])
    layers_at_once = min(value["digest_threads"], shape.layers)
    faster, slower = sorted((link_byte_s, thread_byte_s / layers_at_once))
    return slower + faster * layers_at_once / shape.layers


def _sequence_s(flops_s: float, step_base_s: float) -> float:
    """Return the seconds that a decoding sequence adds to a step.

    A step takes the longer of reading the weights (``step_base_s``) and computing (``flops_s`` per sequence). The
    linear model joins its times at 0 and at MAX_RUNNING sequences.
    """
    return max(0.0, flops_s - step_base_s / MAX_RUNNING)


def layer_elements(shape: ModelShape) -> int:
    """Return the number of weights of one layer's linear modules."""
    return sum(shape.in_features(module) * sum(shape.out_features(module)) for module in MODULES)


def read_bytes(shape: ModelShape) -> int:
    """Return the weight bytes that each step reads: all linear modules and the output head, not the embedding."""
    return (shape.layers * layer_elements(shape) + shape.vocab * shape.hidden) * ITEM_BYTES


def weight_bytes(shape: ModelShape) -> int:
    """Return the bytes of all weights. Embedding and output head are assumed to be stored separately."""
    return read_bytes(shape) + shape.vocab * shape.hidden * ITEM_BYTES


def prefill_flops(shape: ModelShape) -> int:
    """Return the FLOPs of a prefill token, excluding attention and output head."""
    return 2 * shape.layers * layer_elements(shape)


def decode_flops(shape: ModelShape) -> int:
    """Return the FLOPs of a decoding sequence in a step, excluding attention."""
    return prefill_flops(shape) + 2 * shape.vocab * shape.hidden


def attention_flops(shape: ModelShape) -> int:
    """Return the FLOPs per pair of a token and a context token: one product with the key and one with the value."""
    return 4 * shape.layers * shape.heads * shape.head_dim


def kv_bytes(shape: ModelShape) -> int:
    """Return the KV bytes of one token."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * ITEM_BYTES


def rank_elements(shape: ModelShape) -> int:
    """Return how many elements each unit of rank adds to a packed adapter that changes all projections."""
    return shape.layers * sum(
        len(shape.out_features(module)) * shape.in_features(module) + sum(shape.out_features(module))
        for module in MODULES
    )


def lora_activation_bytes(shape: ModelShape) -> int:
    """Return the activation bytes that LoRA moves per token: inputs are read, outputs are read and written.

    The result does not depend on the rank. Every token is assumed to use an adapter.
    """
    return (
        shape.layers
        * ITEM_BYTES
        * sum(shape.in_features(module) + 2 * sum(shape.out_features(module)) for module in MODULES)
    )


def _engine(shape: ModelShape, hardware: Hardware) -> EngineShape:
    """Return the capacities of an engine, computed as in ``services/loraserve/engine/cuda/memory.py``."""
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
    """Return the activation bytes of the largest step: the activations of one layer and the float32 logits."""
    outputs = sum(sum(shape.out_features(module)) for module in MODULES) + 2 * shape.hidden + shape.ffn
    return MAX_STEP_TOKENS * outputs * ITEM_BYTES + MAX_RUNNING * shape.vocab * 4
