"""An engine with a given runner imports no torch, which takes 98 s in the RDMA tests' virtual machine."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["loraserve.engine.service", "loraserve.monitor.service"])
def test_the_service_imports_no_torch(module: str) -> None:
    unwanted = "{'torch', 'numba', 'scipy', 'transformers', 'safetensors', 'triton'}"
    code = f"import sys, {module}; assert not {unwanted} & set(sys.modules), {unwanted} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
