"""The engines part of scripts/bench transfer: the run and its figures."""

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import uvloop

from harness.driver import driving
from harness.engines import Engines, config_for, short_folder
from harness.remote_reads import (
    READERS,
    RESIDENT,
    Read,
    RemoteReads,
    StepGaps,
    medians,
    p99,
    pool_for_ranks,
    reader_settings,
    start_all,
    ttft_ratio,
    write_adapters,
)
from harness.report import BenchError, Number, rounded, table
from loraserve.demo.model import prepare_model
from loraserve.demo.paths import default_data_dir
from loraserve.model_shape import read_model_config, shape_from_config

SMALL, LARGE = 8, 64
GOAL_GROWTH = 0.10


class Plan(NamedTuple):
    """The owner's adapters by ``ranks``, the number of reads of each rank, and the number of blocks with loads."""

    ranks: tuple[int, ...]
    small_reads: int
    large_reads: int
    blocks: int


def ranks_of(count: int) -> tuple[int, ...]:
    """Return ``count`` ranks. Every fifth rank is large."""
    return tuple(LARGE if number % 5 == 4 else SMALL for number in range(count))


FULL = Plan(ranks_of(51), 20, 10, 6)
"""One adapter is resident, 50 are loaded."""
QUICK = Plan(ranks_of(27), 4, 3, 2)


class Remote(NamedTuple):
    """The measurements: ``reads`` by rank and read source, and the step times."""

    reads: Mapping[int, Mapping[str, Sequence[Read]]]
    gaps: StepGaps

    def ratios(self) -> dict[str, Number]:
        """Return the ratios of the worst rank."""
        return {
            "step_growth_while_loading": rounded(self.gaps.growth),
            "remote_ttft_vs_resident": rounded(max(ttft_ratio(each["shm"]) for each in self.reads.values())),
        }

    def figures(self) -> dict[str, Number]:
        found: dict[str, Number] = {}
        for rank, reads in self.reads.items():
            for way, (ttft_s, read_s) in medians(reads).items():
                found[f"ttft_{way}_r{rank}_s"] = ttft_s
                if way != RESIDENT:
                    found[f"read_{way}_r{rank}_s"] = read_s
        for name, gaps_s in (("loading", self.gaps.on_s), ("quiet", self.gaps.off_s)):
            found[f"step_{name}_median_s"] = statistics.median(gaps_s)
            found[f"step_{name}_p99_s"] = p99(gaps_s)
        return {**found, "loads_beside_steps": self.gaps.loads}

    def tables(self) -> str:
        return "\n".join([*(_reads_table(rank, reads) for rank, reads in self.reads.items()), self._steps_table()])

    def _steps_table(self) -> str:
        rows: list[list[object]] = [
            [name, statistics.median(gaps_s) * 1e3, p99(gaps_s) * 1e3, len(gaps_s)]
            for name, gaps_s in (("adapters are loaded", self.gaps.on_s), ("none is loaded", self.gaps.off_s))
        ]
        growth = ["growth", self.gaps.growth, "", ""]
        goal = ["goal", f"< {GOAL_GROWTH}", "", ""]
        title = f"Steps of streams of a resident adapter, {self.gaps.loads} loads beside them"
        return table(title, ["meanwhile", "median ms", "P99 ms", "steps"], [*rows, growth, goal])


def _reads_table(rank: int, reads: Mapping[str, Sequence[Read]]) -> str:
    rows: list[list[object]] = []
    for way, (ttft_s, read_s) in medians(reads).items():
        resident = way == RESIDENT
        over = None if resident else ttft_ratio(reads[way])
        count = sum(len(each) for each in reads.values()) if resident else len(reads[way])
        rows.append([way, ttft_s * 1e3, None if resident else read_s * 1e3, over, count])
    header = ["source of the adapter", "TTFT ms", "read ms", "TTFT / resident", "reads"]
    return table(f"First token of a request, rank {rank}, medians", header, rows)


def measure_remote(plan: Plan) -> Remote:
    """Run the engines and measure. Raises BenchError if an engine fails."""
    with tempfile.TemporaryDirectory(prefix="ls-transfer-") as made, short_folder() as run_dir:
        folder = Path(made)
        model = prepare_model(default_data_dir(), lambda text: None)
        shape = shape_from_config(read_model_config(model))
        adapters = write_adapters(folder / "adapters", shape, plan.ranks)
        overrides = {"engine": {"pool_bytes": pool_for_ranks(shape, plan.ranks)}}
        config = config_for(folder, run_dir, model, 1 + len(READERS), overrides)
        with Engines(folder, config, reader_settings()) as engines:
            try:
                return uvloop.run(_measure(engines, adapters, plan))
            except BenchError as error:
                raise BenchError(f"{error}\n{engines.log_tails()}") from error


async def _measure(engines: Engines, folders: Mapping[str, Path], plan: Plan) -> Remote:
    async with driving(engines.config) as driver:
        adapters = await start_all(engines, driver, folders)
        remote = RemoteReads(
            engines, driver, adapters, shape_from_config(read_model_config(Path(engines.config.model.path)))
        )
        small = await remote.first_tokens(SMALL, plan.small_reads)
        large = await remote.first_tokens(LARGE, plan.large_reads)
        return Remote({SMALL: small, LARGE: large}, await remote.while_loading(plan.blocks))
