"""Measure the fastest block sizes of the LoRA kernels on this GPU and write them into a table.

Engines on a GPU of the same name use the table from their next start on. Each module of the model, bucket of tokens and
bucket of ranks is an entry; a second run adds its entries to the table. Needs a CUDA GPU that nothing else uses.

    scripts/tune_kernels                                  all entries of Llama-3-8B, for 20 minutes
    scripts/tune_kernels --tokens 64 --ranks 256          the entries of mixed decode steps of 33 to 64 tokens
    scripts/tune_kernels --model DIR --minutes 60         the shape of another Hugging Face model
"""

import argparse
import datetime
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch

from loraserve.benchmarks.lora.cases import LLAMA_3_8B
from loraserve.benchmarks.lora.report import say
from loraserve.benchmarks.tuning.search import TuningTarget, targets
from loraserve.errors import ConfigError
from loraserve.kernels.lora.tuning import RANK_BUCKETS, TABLES, TOKEN_BUCKETS, TunedBlocks, TuningTable
from loraserve.model_shape import read_model_config, shape_from_config

MIN_SEARCH_S = 45.0
"""Enough to compile and time about 40 kernels."""


def table_path(folder: Path, gpu: str) -> Path:
    """Return the path of the table for GPUs of this name."""
    return folder / (re.sub(r"\W+", "-", gpu).strip("-") + ".json")


def write_table(folder: Path, gpu: str, command: str, date: str, entries: Sequence[TunedBlocks]) -> Path:
    """Add ``entries`` to the GPU's table, sorted by their keys, and return its path."""
    path = table_path(folder, gpu)
    known = msgspec.json.decode(path.read_bytes(), type=TuningTable).entries if path.exists() else ()
    merged = {(entry.k, entry.widths, entry.tokens, entry.rank): entry for entry in (*known, *entries)}
    table = TuningTable(gpu=gpu, command=command, date=date, entries=tuple(merged[key] for key in sorted(merged)))
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n")
    return path


def tune_all(
    wanted: Sequence[TuningTarget],
    tune: Callable[[TuningTarget, float], TunedBlocks | None],
    minutes: float,
    keep: Callable[[TunedBlocks], None],
) -> int:
    """Tune the targets until the time is up and return how many entries were kept.

    Each target gets an equal part of the time left, but at least enough for one search.
    """
    end_s = time.monotonic() + 60 * minutes
    kept = 0
    for index, target in enumerate(wanted):
        now_s = time.monotonic()
        if now_s >= end_s:
            say(f"time is up: {len(wanted) - index} of {len(wanted)} entries were not measured")
            break
        say(f"{index + 1}/{len(wanted)}: {target.name}")
        fair_s = (end_s - now_s) / (len(wanted) - index)
        entry = tune(target, min(end_s, now_s + max(MIN_SEARCH_S, fair_s)))
        if entry is not None:
            kept += 1
            keep(entry)
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if an entry was measured, 1 if none was."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    if not torch.cuda.is_available():
        print("error: no CUDA GPU here; block sizes must be measured on the GPU that will use them", file=sys.stderr)
        return 1
    try:
        shape = shape_from_config(read_model_config(options.model)) if options.model else LLAMA_3_8B
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # Triton is needed from here on.
    from loraserve.benchmarks.lora.measure import GraphTimer, WorldSettings, copy_bytes_per_s
    from loraserve.benchmarks.tuning.tuner import Tuner

    gpu = torch.cuda.get_device_name()
    timer = GraphTimer(options.seconds)
    tuner = Tuner(timer, copy_bytes_per_s(timer), WorldSettings(shape=shape))
    command, date = " ".join(["scripts/tune_kernels", *given]), datetime.date.today().isoformat()

    def keep(entry: TunedBlocks) -> None:
        write_table(options.out, gpu, command, date, [entry])

    kept = tune_all(targets(shape, options.tokens, options.ranks), tuner.tune, options.minutes, keep)
    say(f"{kept} entries are in {table_path(options.out, gpu)}")
    return 0 if kept else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/tune_kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder of a Hugging Face model (Llama-3-8B)")
    parser.add_argument("--minutes", type=float, default=20.0, help="stop after this time (20)")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        choices=TOKEN_BUCKETS,
        default=TOKEN_BUCKETS,
        metavar="N",
        help=f"only these buckets: {', '.join(map(str, TOKEN_BUCKETS[:-1]))}, and {TOKEN_BUCKETS[-1]} for all above",
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", choices=RANK_BUCKETS, default=RANK_BUCKETS, help="only these buckets"
    )
    parser.add_argument("--seconds", type=float, default=0.05, help="duration of each timing (0.05)")
    parser.add_argument("--out", type=Path, default=TABLES, metavar="DIR", help="folder of the table (the kernels')")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
