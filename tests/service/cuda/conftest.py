"""CUDA drivers to test with: one in software, compiled here, and the machine's own where it has a GPU."""

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
def software_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler for the CUDA driver in software")
    header = next((folder for folder in _header_folders() if (folder / "cuda.h").exists()), None)
    if header is None:
        pytest.skip("neither triton nor CUDA is here, whose cuda.h the CUDA driver in software is compiled against")
    library = tmp_path_factory.mktemp("cuda") / "fake_libcuda.so"
    subprocess.run([compiler, *FLAGS, "-isystem", str(header), str(SOURCE), "-o", str(library)], check=True)
    return library


@pytest.fixture
def software(software_driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver in software, for this process and those that it starts; a fresh one, which remembers no other test."""
    monkeypatch.setenv(OTHER_LIBRARY, str(shutil.copy(software_driver, tmp_path)))


@pytest.fixture(params=["software", pytest.param("hardware", marks=pytest.mark.gpu)])
def driver(request: pytest.FixtureRequest) -> str:
    """Each driver that there is."""
    if request.param == "hardware" and not torch.cuda.is_available():
        pytest.skip("waits for a CUDA GPU")
    if request.param == "software":
        request.getfixturevalue("software")
    return str(request.param)


@pytest.fixture
def setting(software: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Changes what the driver in software pretends from here on, see its head."""
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
