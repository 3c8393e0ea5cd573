"""Time the LoRA kernels on a GPU beside the memory floor and beside vLLM's and SGLang's; check them without a GPU."""

import json
import subprocess
import sys
from collections.abc import Sequence

from harness.report import ROOT, BenchError
from peers import kernel_wheels

from loraserve.benchmarks.lora import command as bench_lora
from loraserve.benchmarks.lora.peers import DEFAULT_FOLDER, SGLANG, VLLM


def main(arguments: Sequence[str]) -> int:
    """Return 0 once the line is printed, 1 if a result is wrong. What this machine cannot measure is null."""
    parser = bench_lora.parser("scripts/bench lora")
    parser.add_argument("--install-peers", action="store_true", help="download vLLM's and SGLang's kernels, then exit")
    parser.set_defaults(peers=ROOT / DEFAULT_FOLDER)
    options = parser.parse_args(arguments)
    if not options.install_peers:
        return bench_lora.run(options, decode_with_64_adapters)
    try:
        for name in (VLLM, SGLANG):
            kernel_wheels.install(options.peers, name)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def decode_with_64_adapters(quick: bool) -> float | None:
    """Return the engine's tokens per second with an adapter for every sequence, over those without adapters.

    The engine runs in a process of its own, because it needs the GPU's memory for itself.
    """
    command = [sys.executable, "-m", "loraserve.benchmarks.engine", *(["--quick"] if quick else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="")
    last = done.stdout.splitlines()[-1:] or [""]
    if done.returncode or not last[0].startswith("{"):
        return None
    ratio: float = json.loads(last[0])["decode_with_64_adapters"]
    return ratio
