"""LoRA kernels on a GPU against the memory's speed, vLLM's and SGLang's; without a GPU they are checked, not timed."""

import sys
from collections.abc import Sequence

from harness.report import ROOT, BenchError
from peers import kernel_wheels

from loraserve.kernels import bench_lora
from loraserve.kernels.bench.peers import DEFAULT_FOLDER, SGLANG, VLLM


def main(arguments: Sequence[str]) -> int:
    """Returns 0 once the line is printed, nulls for what this machine cannot measure; 1 where a result is wrong."""
    parser = bench_lora.parser("scripts/bench lora")
    parser.add_argument("--install-peers", action="store_true", help="get vLLM's and SGLang's kernel files, then end")
    parser.set_defaults(peers=ROOT / DEFAULT_FOLDER)
    options = parser.parse_args(arguments)
    if not options.install_peers:
        return bench_lora.run(options)
    try:
        for name in (VLLM, SGLANG):
            kernel_wheels.install(options.peers, name)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
