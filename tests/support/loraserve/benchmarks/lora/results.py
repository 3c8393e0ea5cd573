"""From measured lines to the keys of the bench. What was not measured is None, with its reason among the figures."""

from loraserve.benchmarks.lora.cases import ALL_LARGE, ALL_SMALL, DECODE_64X8, DECODE_64X64, HALF_LARGE, PREFILL, Case
from loraserve.benchmarks.lora.keys import NO_RATIOS
from loraserve.benchmarks.lora.measure import Measurer
from loraserve.benchmarks.lora.program import CSGMV, OURS, SGLANG_V2, VLLM_8, VLLM_128, VLLM_256
from loraserve.benchmarks.lora.report import Value, table


def ratios(measured: Measurer) -> dict[str, Value]:
    """DESIGN.md section 9. ``vs_floor_*`` and ``rank8_penalty`` are better when small, the others when large.

    ``rank8_penalty`` is the step of 32 rank-8 and 32 rank-128 tokens over the step of 64 rank-8 tokens: what a rank-8
    request waits longer for its token when half of its neighbours have rank 128.
    """
    return {
        **NO_RATIOS,
        "vs_floor_64x64": _floor_ratio(measured, DECODE_64X64),
        "vs_floor_64x8": _floor_ratio(measured, DECODE_64X8),
        "vs_floor_prefill": _floor_ratio(measured, PREFILL),
        "vs_vllm_128": measured.ratio(DECODE_64X64, VLLM_128),
        "vs_vllm_256": measured.ratio(DECODE_64X64, VLLM_256),
        "vs_sglang_v2": measured.ratio(DECODE_64X64, SGLANG_V2),
        "rank8_penalty": measured.ratio(HALF_LARGE, OURS, OURS, ALL_SMALL),
    }


def figures(measured: Measurer, bytes_per_s: float, plan_ms: float) -> dict[str, Value]:
    """Times in microseconds a layer; of ``rank8_penalty`` the peers' and the floor's; of each null its reason.

    ``rank8_penalty_vllm`` compares servers: rank 8 alone at max_lora_rank 8, the mixed batch at 128.
    ``rank8_penalty_vllm_one_server`` has 128 for both: there all pay for the largest rank at any time.
    """
    found: dict[str, Value] = {
        "copy_gb_per_s": bytes_per_s / 1e9,
        "plan_a_step_us": plan_ms * 1e3,
        "rank8_penalty_floor": _floor_penalty(measured),
        "rank8_penalty_vllm": measured.ratio(HALF_LARGE, VLLM_128, VLLM_8, ALL_SMALL),
        "rank8_penalty_vllm_one_server": measured.ratio(HALF_LARGE, VLLM_128, VLLM_128, ALL_SMALL),
        "rank8_penalty_sglang_v2": measured.ratio(HALF_LARGE, SGLANG_V2, SGLANG_V2, ALL_SMALL),
        "uniform128_vs_vllm_128": measured.ratio(ALL_LARGE, VLLM_128),
        "uniform128_vs_sglang_v2": measured.ratio(ALL_LARGE, SGLANG_V2),
        "vs_sglang_csgmv": measured.ratio(DECODE_64X64, CSGMV),
    }
    for (case, side), line in measured.lines.items():
        found[f"{_key(case)}_{side}_us"] = line.ms * 1e3
        found[f"{_key(case)}_floor_us"] = line.floor_ms * 1e3
    for (case, side), reason in measured.reasons.items():
        found[f"{_key(case)}_{side}_not_measured"] = reason
    return found


def lines_table(measured: Measurer) -> str:
    """Every measured line, for people."""
    header = ["case", "side", "us a layer", "floor us", "of floor", "untuned us", "error", "over ours"]
    rows: list[list[Value]] = []
    for (case, side), line in measured.lines.items():
        ours = measured.lines.get((case, OURS))
        over = line.ms / ours.ms if ours else None
        us = [1e3 * value for value in (line.ms, line.floor_ms)]
        rows.append([case, side, *us, line.ratio, 1e3 * line.untuned_ms, line.error, over])
    return table(header, rows)


def _floor_ratio(measured: Measurer, case: Case) -> float | None:
    line = measured.lines.get((case.name, OURS))
    return None if line is None else line.ratio


def _floor_penalty(measured: Measurer) -> float | None:
    mixed, small = (measured.lines.get((case.name, OURS)) for case in (HALF_LARGE, ALL_SMALL))
    return None if mixed is None or small is None else mixed.floor_ms / small.floor_ms


def _key(case: str) -> str:
    return case.replace(" + ", "_and_").replace(" ", "_")
