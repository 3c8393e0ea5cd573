"""LoRA time per layer on a CUDA GPU, beside the memory floor and beside vLLM's and SGLang's kernels.

A step is all four modules of 8 layers of Llama-3-8B in bfloat16, replayed as a CUDA graph with a cold L2 cache. The
floor moves A and B of the step's adapters once, reads x, reads and writes y, at the speed of a large copy measured in
the same run. Every side is checked against the definition before it is timed. Peers get a search over their blocks;
`--peers` names the folder of their kernels. Without a CUDA GPU nothing is timed: the kernels are checked in Triton's
interpreter instead.

    python -m loraserve.benchmarks.lora.command --quick
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from loraserve.benchmarks.lora.cases import OURS, PEERS
from loraserve.benchmarks.lora.peers import DEFAULT_FOLDER
from loraserve.benchmarks.lora.report import NO_RATIOS, Value, last_line, say
from loraserve.testing.triton_interpreter import use_interpreter


def parser(prog: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="only the cases of the ratios, fewer blocks tried for peers")
    made.add_argument(
        "--peers", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help="the folder of the peers' kernels (.peers)"
    )
    made.add_argument(
        "--side", action="append", choices=(OURS, *PEERS), help="time only this side and ours; may be repeated (all)"
    )
    return made


def run(options: argparse.Namespace, whole_steps: Callable[[bool], float | None] = lambda quick: None) -> int:
    """Run the benchmark. Return 0 once the line is printed, 1 if a result of ours is wrong.

    What this machine cannot measure is null. ``whole_steps`` measures ``decode_with_64_adapters``, which needs an
    engine; by default the key stays null.
    """
    return _measure(options, whole_steps) if torch.cuda.is_available() else _check_only(options)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parser("python -m loraserve.benchmarks.lora.command").parse_args(arguments))


def _check_only(options: argparse.Namespace) -> int:
    # The kernels are imported here and not above: Triton decides at the import whether they are interpreted.
    say("no CUDA GPU here: nothing is timed, every ratio is null; the kernels are checked in Triton's interpreter")
    use_interpreter()
    try:
        from loraserve.benchmarks.lora.self_check import errors
        from loraserve.benchmarks.lora.sides import TOLERANCE
    except ImportError as error:
        say(f"Triton is missing too ({error}): nothing is checked")
        print(last_line("lora", NO_RATIOS, {}))
        return 0
    found, reasons = errors(options.peers)
    figures: dict[str, Value] = {f"interpreter_error_{name}": value for name, value in found.items()}
    figures.update({f"{name}_not_checked": reason for name, reason in reasons.items()})
    print(last_line("lora", NO_RATIOS, figures))
    wrong = [name for name, value in found.items() if value is not None and not value < TOLERANCE]
    if wrong:
        say(f"wrong results: {', '.join(wrong)}")
    return 1 if wrong else 0


def _measure(options: argparse.Namespace, whole_steps: Callable[[bool], float | None]) -> int:
    from loraserve.benchmarks.lora import measure, report
    from loraserve.benchmarks.lora.cases import DECODE_64X64, makers, program

    timer = measure.GraphTimer()
    bytes_per_s = measure.copy_bytes_per_s(timer)
    say(f"a copy moves {bytes_per_s / 1e9:.0f} GB/s, read and written")
    measured = measure.Measurer(timer, bytes_per_s, options.quick)
    plan_ms = measured.plan_ms(DECODE_64X64)
    makes = makers(options.peers)
    for case, peers in program(options.quick):
        for side in (OURS, *(peer for peer in peers if not options.side or peer in options.side)):
            measured.measure(side, makes[side], case)
    print(report.lines_table(measured) + "\n")
    ratios = {**report.ratios(measured), "decode_with_64_adapters": whole_steps(options.quick)}
    print(last_line("lora", ratios, report.figures(measured, bytes_per_s, plan_ms)))
    return 1 if any(side == OURS for _, side in measured.reasons) else 0


if __name__ == "__main__":
    raise SystemExit(main())
