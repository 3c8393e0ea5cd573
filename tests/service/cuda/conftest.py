"""The CUDA drivers for these tests: a fake one, compiled here, and the machine's own if it has a GPU."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from loraserve.transfer.cuda_driver import OTHER_LIBRARY

SOURCE = Path(__file__).parent / "fake_libcuda.c"
FLAGS = ("-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", "-pthread")


@pytest.fixture(scope="session")
def fake_driver_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler for the fake CUDA driver")
    header = next((folder for folder in _header_folders() if (folder / "cuda.h").exists()), None)
    if header is None:
        pytest.skip("the fake CUDA driver needs cuda.h, which comes with triton or CUDA")
    library = tmp_path_factory.mktemp("cuda") / "fake_libcuda.so"
    subprocess.run([compiler, *FLAGS, "-isystem", str(header), str(SOURCE), "-o", str(library)], check=True)
    return library


@pytest.fixture
def fake_driver(fake_driver_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Select a new copy of the fake driver, without state of other tests, in this process and its children."""
    monkeypatch.setenv(OTHER_LIBRARY, str(shutil.copy(fake_driver_library, tmp_path)))


@pytest.fixture(params=["fake", pytest.param("hardware", marks=pytest.mark.gpu)])
def driver(request: pytest.FixtureRequest) -> str:
    """Run the test with the fake driver, and with the real one if there is a GPU."""
    if request.param == "hardware" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if request.param == "fake":
        request.getfixturevalue("fake_driver")
    return str(request.param)


@pytest.fixture
def setting(fake_driver: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Return a function that changes a setting of the fake driver; fake_libcuda.c lists them at its top."""
    return lambda name, value: monkeypatch.setenv(f"FAKE_CUDA_{name}", str(value))


def _header_folders() -> Iterator[Path]:
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        yield Path(next(iter(triton.submodule_search_locations))) / "backends" / "nvidia" / "include"
    if "CUDA_HOME" in os.environ:
        yield Path(os.environ["CUDA_HOME"]) / "include"
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        yield Path(nvcc).resolve().parent.parent / "include"
