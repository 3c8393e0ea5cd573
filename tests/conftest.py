"""Which tests may run in parallel, and the figures that tests measured, printed at the end of a run."""

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from loraserve.testing.triton_interpreter import use_interpreter

if not torch.cuda.is_available():
    use_interpreter()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts background jobs of a script with SIGINT ignored, and so do nohup and some CI runners. Children
    # would inherit that, and tests that send them SIGINT would wait in vain.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Property tests draw the same examples in every run, so that a green suite stays green. ``scripts/test --fresh-seed``
# loads the other profile. Tests' own settings inherit from the profile that is loaded when their module is imported.
settings.register_profile("ci", derandomize=True)
settings.register_profile("fresh", derandomize=False, print_blob=True)
settings.load_profile("ci")

MEASURED = "measured"
WHOLE_MACHINE = ("tests/cluster/", "tests/e2e/", "tests/hosts/", "tests/rdma/")
"""Tests in these folders share one cluster or need most of the machine: one worker runs them one by one."""
KERNELS = ("tests/unit/kernels/", "tests/unit/benchmarks/")
"""On a GPU each test in these folders compiles kernels, which takes longest: they are distributed one by one."""
APART = "tests/cluster/test_lifecycle.py"
"""It starts clusters of its own that compute little, so it may run in parallel."""


LONGEST_FIRST = ("test_lora_gpu.py", "cuda/test_truth.py", "test_gpu_report.py", "test_tuning.py")
"""Files that take about a minute. They start first, so that no worker runs one alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> tuple[bool, bool]:
        file = item.nodeid.partition("::")[0]
        return not file.startswith(WHOLE_MACHINE), not file.endswith(LONGEST_FIRST)

    items.sort(key=turn)


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """Keeps the tests of a file together, and those that need the whole machine."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if torch.cuda.is_available() and file.startswith(KERNELS):
            return nodeid
        return "whole machine" if file.startswith(WHOLE_MACHINE) and file != APART else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Return a function that prints a line at the end of the run, because passing tests print nothing."""
    return lambda line: record_property(MEASURED, line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = [
        str(text)
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, text in getattr(report, "user_properties", ())
        if name == MEASURED and report.when == "call"
    ]
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.line(line)
    if not torch.cuda.is_available():
        _report_skipped_gpu_tests(terminalreporter)


def _report_skipped_gpu_tests(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests need a GPU, because interpreted kernels do not cover them."""
    waiting = [report for report in terminalreporter.stats.get("skipped", ()) if "CUDA GPU" in str(report.longrepr)]
    if waiting:
        terminalreporter.section("waits for a GPU")
        terminalreporter.line(
            f"{len(waiting)} tests (captured graphs, streams, the GPU's own arithmetic), and the rest of"
        )
        terminalreporter.line("scripts/gpu_check: kernels against float64 at full size, benchmarks, compute-sanitizer.")
