"""Detection of devices, cores and memory from the files that the kernel and the driver provide."""

from pathlib import Path

import pytest

from loraserve.device import available_memory_share, default_engines, gpu_name, memory_limit_bytes, resolve_device


@pytest.fixture(autouse=True)
def nothing_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("there", "kind"),
    [
        ((), "cpu"),
        (("nvidia0",), "cuda"),
        (("nvidia7", "nvidiactl"), "cuda"),
        (("nvidiactl", "nvidia-uvm"), "cpu"),  # the driver without a GPU, as in a container that was given none
        (("dxg",), "cuda"),  # Windows' subsystem for Linux
        (("null", "tty0"), "cpu"),
    ],
)
def test_auto_selects_a_gpu_that_the_driver_shows(tmp_path: Path, there: tuple[str, ...], kind: str) -> None:
    for name in there:
        (tmp_path / name).touch()
    assert resolve_device("auto", tmp_path) == kind


def test_a_missing_device_folder_means_no_gpu(tmp_path: Path) -> None:
    assert resolve_device("auto", tmp_path / "missing") == "cpu"


def test_an_explicit_device_is_used_unconditionally(tmp_path: Path) -> None:
    assert resolve_device("cuda", tmp_path) == "cuda"
    (tmp_path / "nvidia0").touch()
    assert resolve_device("cpu", tmp_path) == "cpu"


def test_there_is_an_engine_for_each_gpu_or_two_on_a_cpu(tmp_path: Path) -> None:
    assert default_engines("auto", tmp_path) == 2
    for number in range(3):
        (tmp_path / f"nvidia{number}").touch()
    assert default_engines("auto", tmp_path) == 3
    assert default_engines("cpu", tmp_path) == 2
    assert default_engines("cuda", tmp_path / "missing") == 1


@pytest.mark.parametrize(
    ("visible", "engines"),
    [("0", 1), ("2,0", 2), ("GPU-8932f937", 1), ("0,1,2,3,4", 3), ("", 2), ("-1", 2), ("NoDevFiles", 2), ("1,-1,0", 1)],
)
def test_gpus_that_are_hidden_from_cuda_get_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, engines: int
) -> None:
    for number in range(3):
        (tmp_path / f"nvidia{number}").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert default_engines("auto", tmp_path) == engines
    hidden = visible in ("", "-1", "NoDevFiles")
    assert resolve_device("auto", tmp_path) == ("cpu" if hidden else "cuda")


def test_the_driver_names_the_gpu(tmp_path: Path) -> None:
    assert gpu_name(tmp_path) == ""
    folder = tmp_path / "0000:3b:00.0"
    folder.mkdir()
    (folder / "information").write_text("Model: \t\t NVIDIA A100-SXM4-80GB\nIRQ:   \t\t 42\n")
    assert gpu_name(tmp_path) == "NVIDIA A100-SXM4-80GB"


def test_a_lower_container_limit_replaces_the_memory_of_the_machine(tmp_path: Path) -> None:
    machine = memory_limit_bytes(())
    limits = [tmp_path / name for name in ("none", "old", "new")]
    assert memory_limit_bytes(limits) == machine > 1 << 20
    limits[1].write_text(f"{1 << 62}\n")
    limits[2].write_text("max\n")
    assert memory_limit_bytes(limits) == machine
    limits[2].write_text("1048576\n")
    assert memory_limit_bytes(limits) == 1 << 20


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    250 kB\n", 0.25),
        ("MemTotal:       1000 kB\n", 0.0),
        ("MemTotal: 0 kB\nMemAvailable: 0 kB\n", 0.0),
        ("what is this", 0.0),
    ],
)
def test_the_available_share_comes_from_meminfo(tmp_path: Path, text: str, share: float) -> None:
    file = tmp_path / "meminfo"
    file.write_text(text)
    assert available_memory_share(file, tmp_path) == share


def test_the_available_share_is_zero_if_unknown(tmp_path: Path) -> None:
    assert available_memory_share(tmp_path / "none", tmp_path) == 0.0


@pytest.mark.parametrize(
    ("limit", "used"),
    [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")],
)
def test_a_container_limit_reduces_the_available_share(tmp_path: Path, limit: str, used: str) -> None:
    (tmp_path / "memory").mkdir()
    file = tmp_path / "meminfo"
    file.write_text("MemTotal: 1000 kB\nMemAvailable: 900 kB\n")
    for current, share in (("50", 0.75), ("10", 0.9), ("300", 0.0)):
        (tmp_path / limit).write_text("200\n")
        (tmp_path / used).write_text(current)
        assert available_memory_share(file, tmp_path) == share
    (tmp_path / limit).write_text("max\n")
    assert available_memory_share(file, tmp_path) == 0.9
