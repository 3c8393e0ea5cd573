"""Measures which block sizes of the LoRA kernels are the fastest on this GPU, and keeps them in a table.

Engines on a GPU of the same name use the table from their next start on. Every module of the model, bucket of tokens
and bucket of ranks is an entry; a second run adds to the table what it measures. Wants a CUDA GPU for itself.

    scripts/tune_kernels                                  all of Llama-3-8B's, for 20 minutes
    scripts/tune_kernels --tokens 64 --ranks 256          what mixed decode steps of 33 to 64 tokens use
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
from loraserve.benchmarks.lora.search import Target, targets
from loraserve.errors import ConfigError
from loraserve.kernels.lora.tuning import RANK_BUCKETS, TABLES, TOKEN_BUCKETS, TunedBlocks, TuningTable
from loraserve.model_shape import read_model_config, shape_from_config

LEAST_SEARCH_S = 45.0
"""About 40 kernels are compiled and timed in it."""


def table_path(folder: Path, gpu: str) -> Path:
    """Where the table of a GPU of this name lies."""
    return folder / (re.sub(r"\W+", "-", gpu).strip("-") + ".json")


def write_table(folder: Path, gpu: str, command: str, date: str, entries: Sequence[TunedBlocks]) -> Path:
    """Add ``entries`` to the GPU's table, in an order that does not depend on when each was measured."""
    path = table_path(folder, gpu)
    known = msgspec.json.decode(path.read_bytes(), type=TuningTable).entries if path.exists() else ()
    merged = {(entry.k, entry.widths, entry.tokens, entry.rank): entry for entry in (*known, *entries)}
    table = TuningTable(gpu=gpu, command=command, date=date, entries=tuple(merged[key] for key in sorted(merged)))
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n")
    return path


def run(
    wanted: Sequence[Target],
    tune: Callable[[Target, float], TunedBlocks | None],
    minutes: float,
    keep: Callable[[TunedBlocks], None],
) -> int:
    """How many entries were kept before the time was up.

    Each target gets an equal part of what is left, but enough for a search: the first ones are done well, or none is.
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
        entry = tune(target, min(end_s, now_s + max(LEAST_SEARCH_S, fair_s)))
        if entry is not None:
            kept += 1
            keep(entry)
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 where an entry was measured, 1 where none could be."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    if not torch.cuda.is_available():
        print("error: no CUDA GPU here; block sizes can only be measured on the GPU that they are for", file=sys.stderr)
        return 1
    try:
        shape = shape_from_config(read_model_config(options.model)) if options.model else LLAMA_3_8B
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from loraserve.benchmarks.lora.timing import GraphTimer, copy_bytes_per_s
    from loraserve.benchmarks.lora.tuner import Tuner

    gpu = torch.cuda.get_device_name()
    timer = GraphTimer(options.seconds)
    tuner = Tuner(shape, timer, copy_bytes_per_s(timer))
    command, date = " ".join(["scripts/tune_kernels", *given]), datetime.date.today().isoformat()

    def keep(entry: TunedBlocks) -> None:
        write_table(options.out, gpu, command, date, [entry])

    kept = run(targets(shape, options.tokens, options.ranks), tuner.tune, options.minutes, keep)
    say(f"{kept} entries are in {table_path(options.out, gpu)}")
    return 0 if kept else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/tune_kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="a Hugging Face model's folder (Llama-3-8B's shape)")
    parser.add_argument("--minutes", type=float, default=20.0, help="when to stop (20)")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        choices=TOKEN_BUCKETS,
        default=TOKEN_BUCKETS,
        metavar="N",
        help=f"these buckets alone, of {', '.join(map(str, TOKEN_BUCKETS[:-1]))} and {TOKEN_BUCKETS[-1]} for all above",
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", choices=RANK_BUCKETS, default=RANK_BUCKETS, help="these buckets alone"
    )
    parser.add_argument("--seconds", type=float, default=0.05, help="of each timing (0.05)")
    parser.add_argument("--out", type=Path, default=TABLES, metavar="DIR", help="where the table goes (the kernels')")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
