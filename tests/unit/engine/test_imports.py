"""An engine that is given a runner needs no torch: in the RDMA tests' virtual machine that takes 98 s to import."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["loraserve.engine.service", "loraserve.monitor.service"])
def test_a_service_is_imported_without_what_computes(module: str) -> None:
    unwanted = "{'torch', 'numba', 'scipy', 'transformers', 'safetensors', 'triton'}"
    code = f"import sys, {module}; assert not {unwanted} & set(sys.modules), {unwanted} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
