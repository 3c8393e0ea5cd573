"""The output of the LoRA benchmark: progress, tables, and the final line of JSON with ratios and figures.

A value that was not measured is None, and the figures have the reason.
"""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from loraserve.benchmarks.lora.cases import (
    ALL_LARGE,
    ALL_SMALL,
    CSGMV,
    DECODE_64X8,
    DECODE_64X64,
    HALF_LARGE,
    OURS,
    PREFILL,
    SGLANG_V2,
    VLLM_8,
    VLLM_128,
    VLLM_256,
    LoraCase,
)

if TYPE_CHECKING:
    from loraserve.benchmarks.lora.measure import Measurer

STARTED_S = time.monotonic()

Value = float | int | str | None

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
"""The keys of the benchmark, before anything is measured."""


def say(text: str) -> None:
    """Print one line of progress to stderr."""
    print(f"[{time.monotonic() - STARTED_S:6.1f} s] {text}", file=sys.stderr, flush=True)


def aligned(header: Sequence[str], rows: Sequence[Sequence[Value]]) -> str:
    """Return a table with aligned columns. The first two columns are text; None is shown as "-"."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        padded = [
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _cell(value: Value) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def last_line(bench: str, ratios: Mapping[str, Value], figures: Mapping[str, Value]) -> str:
    """Return the line of JSON. None becomes null: not measured."""
    content = {
        "bench": bench,
        "ratios": {name: _rounded(value) for name, value in ratios.items()},
        "figures": {name: _rounded(value) for name, value in figures.items()},
        "machine": machine(),
        "commit": commit(),
    }
    return msgspec.json.encode(content).decode()


def _rounded(value: Value) -> Value:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def machine() -> str:
    """Return the GPU's name and the versions of torch and triton."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA GPU"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return f"{name}, torch {torch.__version__}, triton {triton}"


def commit() -> str:
    """Return the checkout's commit, marked if tracked files differ from it, or "unknown" outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def ratios(measured: "Measurer") -> dict[str, Value]:
    """Return the ratios. Smaller is better for ``vs_floor_*`` and ``rank8_penalty``, larger for the others.

    ``rank8_penalty`` is the time of a step with 32 rank-8 and 32 rank-128 tokens, divided by the time of a step with 64
    rank-8 tokens. It tells how much longer a rank-8 request waits for a token if half of the batch has rank 128.
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


def figures(measured: "Measurer", bytes_per_s: float, plan_ms: float) -> dict[str, Value]:
    """Return times in microseconds per layer, the rank-8 penalty of peers and floor, and reasons of missing values.

    ``rank8_penalty_vllm`` compares two servers: the rank-8 batch runs with max_lora_rank 8, the mixed batch with 128.
    ``rank8_penalty_vllm_one_server`` uses max_lora_rank 128 for both, as a server with both ranks does.
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


def lines_table(measured: "Measurer") -> str:
    """Return a table of all results."""
    header = ["case", "side", "us a layer", "floor us", "of floor", "untuned us", "error", "over ours"]
    rows: list[list[Value]] = []
    for (case, side), line in measured.lines.items():
        ours = measured.lines.get((case, OURS))
        over = line.ms / ours.ms if ours else None
        us = [1e3 * value for value in (line.ms, line.floor_ms)]
        rows.append([case, side, *us, line.ratio, 1e3 * line.untuned_ms, line.error, over])
    return aligned(header, rows)


def _floor_ratio(measured: "Measurer", case: LoraCase) -> float | None:
    line = measured.lines.get((case.name, OURS))
    return None if line is None else line.ratio


def _floor_penalty(measured: "Measurer") -> float | None:
    mixed, small = (measured.lines.get((case.name, OURS)) for case in (HALF_LARGE, ALL_SMALL))
    return None if mixed is None or small is None else mixed.floor_ms / small.floor_ms


def _key(case: str) -> str:
    return case.replace(" + ", "_and_").replace(" ", "_")
