"""GPU kernels do not import numba, and a call on the CPU goes directly to its implementation."""

import subprocess
import sys

import pytest
import torch

from loraserve.kernels import lora
from loraserve.kernels.lora import cpu


def test_the_package_names_the_cpus_function_itself() -> None:
    assert lora.add_lora is cpu.add_lora
    assert lora.warm_up is cpu.warm_up
    with pytest.raises(AttributeError, match="no attribute 'sub_lora'"):
        _ = lora.sub_lora


def test_the_device_decides() -> None:
    pytest.importorskip("triton", reason="the GPU kernels need triton")
    from loraserve.kernels.lora import gpu

    assert lora.implementation("cpu") is cpu
    assert lora.implementation(torch.device("cuda", 0)) is gpu
    with pytest.raises(KeyError):
        lora.implementation("meta")


def test_the_gpus_kernels_and_benches_are_imported_without_numba() -> None:
    pytest.importorskip("triton", reason="the GPU kernels need triton")
    names = "loraserve.kernels.lora.gpu, loraserve.benchmarks.lora.command, loraserve.benchmarks.tuning.command"
    unwanted = "{'numba', 'llvmlite', 'pydantic', 'transformers', 'safetensors'}"
    code = f"import sys, {names}; assert not {unwanted} & set(sys.modules), {unwanted} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
