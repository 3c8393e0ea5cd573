"""The keys of the bench, DESIGN.md section 9."""

from loraserve.benchmarks.lora.report import Value

NO_RATIOS: dict[str, Value] = dict.fromkeys(
    (
        "vs_floor_64x64",
        "vs_floor_64x8",
        "vs_floor_prefill",
        "vs_vllm_128",
        "vs_vllm_256",
        "vs_sglang_v2",
        "rank8_penalty",
        "decode_with_64_adapters",
    )
)
