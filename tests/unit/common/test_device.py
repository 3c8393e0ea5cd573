"""Which kind of device is taken, as told by the folder in which the kernel shows devices."""

from pathlib import Path

import pytest

from loraserve.device import default_engines, device_of


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
def test_auto_is_a_gpu_where_the_driver_shows_one(tmp_path: Path, there: tuple[str, ...], kind: str) -> None:
    for name in there:
        (tmp_path / name).touch()
    assert device_of("auto", tmp_path) == kind


def test_no_devices_at_all_are_no_gpu(tmp_path: Path) -> None:
    assert device_of("auto", tmp_path / "missing") == "cpu"


def test_what_is_asked_for_is_taken_whatever_is_there(tmp_path: Path) -> None:
    assert device_of("cuda", tmp_path) == "cuda"
    (tmp_path / "nvidia0").touch()
    assert device_of("cpu", tmp_path) == "cpu"


def test_there_is_an_engine_for_each_gpu_or_two_on_a_cpu(tmp_path: Path) -> None:
    assert default_engines("auto", tmp_path) == 2
    for number in range(3):
        (tmp_path / f"nvidia{number}").touch()
    assert default_engines("auto", tmp_path) == 3
    assert default_engines("cpu", tmp_path) == 2
    assert default_engines("cuda", tmp_path / "missing") == 1
