"""The GPU kernels compile for both architectures, and their machine code has no faults."""

import os
import subprocess
import sys
from collections.abc import Callable

import msgspec
import pytest

pytest.importorskip("triton", reason="the GPU kernels need triton")

from loraserve.benchmarks.gpu_report import CompileReport, markdown_table
from loraserve.kernels.lora.tuning import default_blocks


def reports(*arguments: str) -> list[CompileReport]:
    """Compile in a process of its own, because kernels may be interpreted in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "loraserve.benchmarks.gpu_report", "--json", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return msgspec.json.decode(done.stdout.splitlines()[0], type=list[CompileReport])


@pytest.mark.parametrize(
    ("architecture", "modules"), [("90", ()), ("80", ("--module", "qkv", "--module", "down"))], ids=["sm_90", "sm_80"]
)
def test_every_kernel_compiles_without_faults(
    architecture: str, modules: tuple[str, ...], measured: Callable[[str], None]
) -> None:
    found = reports("--sm", architecture, *modules)
    decode = [report for report in found if report.decode]
    assert len(decode) >= 6
    assert all(report.spilled_bytes == 0 for report in decode), markdown_table(decode)
    assert all(report.async_128 >= report.wanted_async > 0 for report in decode), markdown_table(decode)
    full = [report for report in decode if not report.name.endswith("T=8")]
    assert all(4 * 4 * 32 * report.registers <= 65536 for report in full), "four programs fit a multiprocessor"
    assert all(report.async_narrow == 0 and not report.faults for report in found), markdown_table(found)
    measured(
        f"sm_{architecture}: {len(found)} kernels compiled, {len(decode)} of them for decode: 0 spilled bytes, "
        f"{sum(r.async_128 for r in decode)} async copies of 128 bits and 0 narrower, "
        f"at most {max(r.registers for r in decode)} registers and {max(r.shared_bytes for r in decode) >> 10} KiB"
    )


def test_faults_are_found() -> None:
    good = CompileReport(
        name="decode", architecture=90, decode=True, registers=128, spilled_bytes=0, shared_bytes=49152, async_128=66,
        async_narrow=0, wanted_async=66, async_tiles=5, wanted_tiles=5, matrix="mma",
    )  # fmt: skip
    assert good.faults == []
    for change, fault in (
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"async_128": 65}, "65 of 66 async copies of 128 bits, 0 narrower"),
        ({"async_narrow": 2}, "66 of 66 async copies of 128 bits, 2 narrower"),
        ({"async_tiles": 3, "async_128": 99}, "3 of 5 tiles are copied asynchronously"),
        ({"shared_bytes": 1 << 20}, "needs 1048576 bytes of shared memory"),
    ):
        assert msgspec.structs.replace(good, **change).faults == [fault]


def test_interpreted_kernels_are_not_taken_for_compiled_ones() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "loraserve.benchmarks.gpu_report"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


@pytest.mark.parametrize("k", [576, 896, 1536, 3584, 4096, 14336, 28672])
@pytest.mark.parametrize("tokens", [1, 8, 64, 256, 512, 2048, 8192])
def test_default_parts_of_k_are_loops(k: int, tokens: int) -> None:
    """A loop that runs once, as for Qwen2-0.5B in eight parts, would copy nothing asynchronously."""
    blocks = default_blocks(k, tokens)
    assert -(-k // blocks.split) > blocks.bk, blocks
