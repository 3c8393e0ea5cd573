"""Implements scripts/profile: builds a configured engine, times its steps and loads, and writes a fitted profile."""

import argparse
import datetime
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loraserve.adapter.pack import Slab, pack_peft
from loraserve.config import Config, load_config
from loraserve.cost.derived import kv_bytes
from loraserve.cost.fit import Lora, StepSample, fit_cost_model
from loraserve.cost.profile import EngineShape, Profile, write_profile
from loraserve.engine.compute.protocol import Runner
from loraserve.engine.compute.runner import CpuRunner
from loraserve.engine.profile.measure import (
    KINDS,
    design_batches,
    make_random_slab,
    make_step,
    measure_loads,
    measure_steps,
    place_slabs,
)
from loraserve.engine.schedule.events import SchedulerLimits
from loraserve.engine.schedule.report import step_shape
from loraserve.engine.setup import build_runner, digest_threads_for, scheduler_limits, threads_for
from loraserve.errors import ConfigError, LoraServeError
from loraserve.kernels import attention
from loraserve.model_shape import ModelShape, read_model_config, shape_from_config
from loraserve.text import table

STARTED_S = time.monotonic()
RANKS = (8, 16, 32, 64)
COPIES = 4
BATCHES, ROUNDS = 180, 3
QUICK_BATCHES, QUICK_ROUNDS = 60, 2
MAX_ERROR = 0.1
"""Maximum median relative error on held-out batches. A larger error means a busy machine or a wrong cost model."""

HELP = """\
examples:
  scripts/profile --model DIR --out mine.json           a few minutes; the machine should be idle
  scripts/profile --model DIR --out mine.json --quick   fewer batches, fewer repeats
  scripts/profile --model DIR --out mine.json --adapter ./support-r16 --ranks 8,128
  scripts/profile --model DIR --out mine.json --set engine.threads=4 --set engine.max_running=32
  scripts/up --model DIR --set cluster.profile=mine.json      use it (with an absolute path from other folders)

The command builds the engine in this process with the configuration that a cluster here would give it (the engines
share the cores). It times 180 batches (60 with --quick) of random tokens: prefill and decode, few and many sequences,
short and long contexts, from no adapter to many of mixed ranks. It fits a linear cost model to the median times, and
tests the model on every fifth batch, which the fit does not use. An engine with one thread is timed in CPU seconds,
which other processes hardly change. Loads are timed from memory. Router and planner learn the time of store and network
from the engines' reports. Adapters have random values, except those that --adapter names.

--lora padded fits the cost of other servers (each token at the largest rank of the batch) to the same batches. If this
machine has a GPU that can be used, the command measures it. The exit status is 1 if the median error is over 10%.
"""


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        profile, text = _measure(options)
        write_profile(profile, options.out)
    except (LoraServeError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{text}\n\n{format_verdict(profile)}\nwritten to {options.out}")
    assert profile.residuals is not None, "the profile was not measured"
    if profile.residuals.median > MAX_ERROR:
        print("error: the median error is over 10%; stop other work on this machine and measure again", file=sys.stderr)
        return 1
    return 0


def _measure(options: argparse.Namespace) -> tuple[Profile, str]:
    if not options.out.parent.is_dir():
        raise ConfigError(f"--out {options.out}: there is no folder {options.out.parent}; create it first")
    config = load_config(options.config, overrides=[*options.set, f"model.path={options.model}"])
    shape = shape_from_config(read_model_config(options.model))
    runner = build_runner(config, _report_progress)
    limits = scheduler_limits(config, runner)
    placed = place_slabs(_make_slabs(options, config, shape), limits.pool_bytes, limits.max_adapters)
    adapters = {slot: slab.header for slot, (_, slab) in enumerate(placed)}
    count, rounds = (QUICK_BATCHES, QUICK_ROUNDS) if options.quick else (BATCHES, ROUNDS)
    _report_progress(f"timing loads of {len(adapters)} adapters")
    cpu_seconds = _uses_cpu_seconds(config, runner)
    threads = digest_threads_for(config, on_device=runner.pool.on_device)
    loads = measure_loads(runner, placed, config.engine.load_chunk_bytes, threads, rounds, cpu_seconds)
    batches = design_batches(limits, len(adapters), count)
    _report_progress(
        f"timing {count} steps, {rounds} times each, {'in CPU seconds' if cpu_seconds else 'by the clock'}"
    )
    to_time = [make_step(index, batch, limits.block_tokens, shape.vocab) for index, batch in enumerate(batches)]
    seconds = measure_steps(runner, to_time, rounds, cpu_seconds, _report_progress)
    steps: list[StepSample] = [(step_shape(b, adapters)[0], s) for b, s in zip(to_time, seconds, strict=True)]
    lora: Lora = options.lora
    cost, residuals = fit_cost_model(steps, loads, lora)
    profile = Profile(
        model=config.model.name or options.model.resolve().name,
        shape=shape,
        hardware=_describe_hardware(config, runner),
        date=datetime.date.today().isoformat(),
        origin="measured",
        cost=cost,
        engine=_engine_shape(config, limits, shape, runner),
        device="cpu" if isinstance(runner, CpuRunner) else "cuda",
        residuals=residuals,
    )
    return (
        profile,
        f"{format_coefficients(profile)}\n\n{format_errors(profile, [batch.kind for batch in batches], steps)}",
    )


def _make_slabs(options: argparse.Namespace, config: Config, shape: ModelShape) -> list[Slab]:
    engine = config.engine
    given = [pack_peft(folder, shape, engine.slab_dtype, engine.max_rank) for folder in options.adapter]
    ranks = [rank for rank in options.ranks if rank <= engine.max_rank]
    seeds = [(rank, copy) for copy in range(COPIES) for rank in ranks]
    return given + [make_random_slab(shape, engine.slab_dtype, rank, seed=1000 * rank + copy) for rank, copy in seeds]


def _engine_shape(config: Config, limits: SchedulerLimits, shape: ModelShape, runner: Runner) -> EngineShape:
    slab = make_random_slab(shape, config.engine.slab_dtype, 16, seed=0)
    on_cpu = isinstance(runner, CpuRunner)
    block_bytes = attention.block_bytes(shape, limits.block_tokens) if on_cpu else 0
    return EngineShape(
        kv_blocks=limits.kv_blocks,
        block_tokens=limits.block_tokens,
        pool_bytes=limits.pool_bytes,
        max_running=limits.max_running,
        max_step_tokens=limits.max_step_tokens,
        max_model_tokens=limits.max_model_tokens,
        slab_bytes_per_rank=slab.header.slab_bytes // 16,
        kv_bytes_per_token=block_bytes // limits.block_tokens if on_cpu else kv_bytes(shape),
    )


def _describe_hardware(config: Config, runner: Runner) -> str:
    if not isinstance(runner, CpuRunner):
        import torch

        return torch.cuda.get_device_name()
    timed = ", in CPU seconds" if _uses_cpu_seconds(config, runner) else ""
    return f"{_processor_name()}, {threads_for(config)} of {os.cpu_count()} cores{timed}"


def _uses_cpu_seconds(config: Config, runner: Runner) -> bool:
    return isinstance(runner, CpuRunner) and threads_for(config) == 1


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/profile",
        description="Measure what steps and adapter loads cost on this machine, for router, planner and simulator.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face model directory")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the profile, as JSON")
    parser.add_argument("--quick", action="store_true", help="fewer batches, fewer repeats")
    parser.add_argument("--lora", choices=("exact", "padded"), default="exact", help="how to price LoRA (exact)")
    parser.add_argument(
        "--ranks", type=_ranks, default=RANKS, metavar="R,R", help="random adapters' ranks (8,16,32,64)"
    )
    parser.add_argument(
        "--adapter", type=Path, action="append", default=[], metavar="DIR", help="also measure with this PEFT folder"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="the cluster's configuration file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one setting")
    return parser


def _ranks(text: str) -> tuple[int, ...]:
    ranks = tuple(int(part) for part in text.split(","))
    if min(ranks) < 1:
        raise argparse.ArgumentTypeError("ranks must be at least 1")
    return ranks


def _report_progress(text: str) -> None:
    print(f"[{time.monotonic() - STARTED_S:6.1f} s] {text}", file=sys.stderr, flush=True)


UNITS = {
    "step_base_s": ("ms a step", 1e3),
    "sequence_s": ("ms a decoding sequence", 1e3),
    "kv_token_s": ("us a token of its context", 1e6),
    "prefill_token_s": ("ms a prefill token", 1e3),
    "prefill_kv_token_s": ("us a prefill token and token of its context", 1e6),
    "slab_byte_s": ("ms a MB of the adapters in the step", 1e9),
    "rank_token_s": ("us a token and unit of its rank", 1e6),
    "padded_prefill_s": ("us a prefill token and unit of the largest rank", 1e6),
    "padded_decode_s": ("us a decoding sequence and unit of the largest rank", 1e6),
    "load_base_s": ("ms a load", 1e3),
    "load_byte_s": ("ms a MB of a load", 1e9),
}
HIDDEN = {"exact": ("padded_prefill_s", "padded_decode_s"), "padded": ("slab_byte_s", "rank_token_s")}


def format_coefficients(profile: Profile) -> str:
    cost = profile.cost
    shown = {name: unit for name, unit in UNITS.items() if name not in HIDDEN[cost.lora]}
    rows = [[f"{getattr(cost, name) * factor:.4g}", text, name] for name, (text, factor) in shown.items()]
    return table(["COST", "OF", "NAME"], rows)


def format_errors(profile: Profile, kinds: Sequence[str], samples: Sequence[StepSample]) -> str:
    """Return a table with one row per kind of batch: count, step times and the cost model's error in percent."""
    rows = []
    for kind in KINDS:
        of_kind = [sample for name, sample in zip(kinds, samples, strict=True) if name == kind]
        if not of_kind:
            continue
        percent_off = [abs(profile.cost.step_s(shape) / seconds - 1) * 100 for shape, seconds in of_kind]
        times_ms = [seconds * 1e3 for _, seconds in of_kind]
        spread = [f"{value:.1f}" for value in (min(times_ms), float(np.median(times_ms)), max(times_ms))]
        rows.append(
            [kind, str(len(of_kind)), *spread, f"{np.median(percent_off):.1f}", f"{np.quantile(percent_off, 0.9):.1f}"]
        )
    return table(["BATCHES", "COUNT", "MIN MS", "MEDIAN MS", "MAX MS", "ERROR % MEDIAN", "P90"], rows)


def format_verdict(profile: Profile) -> str:
    residuals = profile.residuals
    assert residuals is not None, "the profile was not measured"
    return (
        f"{profile.model} on {profile.hardware}: held-out error {residuals.median:.1%} median, {residuals.p90:.1%} P90 "
        f"({residuals.held_out} of {residuals.samples} batches were held out)"
    )
