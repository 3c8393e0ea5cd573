"""Unpacking files of a wheel, which the tests write themselves."""

import subprocess
import zipfile
from pathlib import Path

import pytest
from harness.report import BenchError
from peers import kernel_wheels
from peers.kernel_wheels import install, unpack

from loraserve.benchmarks.lora.peers import VLLM, WANTED, missing, version

METADATA = "Metadata-Version: 2.4\nName: vllm\nVersion: 0.99\n"


def wheel(folder: Path, licence: str = "License-Expression: Apache-2.0\n", without: str = "") -> Path:
    path = folder / "vllm-0.99-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*WANTED[VLLM], "vllm/engine.py", "vllm/lora/ops/triton_ops/__init__.py"):
            if name != without:
                archive.writestr(name, "x = 1\n")
        archive.writestr("vllm-0.99.dist-info/METADATA", METADATA + licence + "\nLicense :: text\n")
        archive.writestr("vllm-0.99.dist-info/licenses/LICENSE", "the licence\n")
    return path


def test_only_wanted_files_are_unpacked(tmp_path: Path) -> None:
    count, size = unpack(wheel(tmp_path), tmp_path / "peers" / VLLM, VLLM)
    assert (count, size) == (len(WANTED[VLLM]) + 1, 6 * len(WANTED[VLLM]) + 12)
    assert not missing(tmp_path / "peers", VLLM)
    assert version(tmp_path / "peers", VLLM) == "0.99"
    assert not (tmp_path / "peers" / VLLM / "vllm" / "engine.py").exists()
    assert (tmp_path / "peers" / VLLM / "LICENCE").read_text() == "Apache-2.0"


def test_a_licence_may_be_a_classifier(tmp_path: Path) -> None:
    unpack(wheel(tmp_path, "Classifier: License :: OSI Approved :: MIT License\n"), tmp_path / VLLM, VLLM)
    assert (tmp_path / VLLM / "LICENCE").read_text() == "MIT License"


def test_a_wheel_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        return wheel(folder)

    monkeypatch.setattr(kernel_wheels, "_download", download)
    install(tmp_path / "peers", VLLM)
    install(tmp_path / "peers", VLLM)
    assert asked == ["vllm>=0.33"]


def test_a_version_whose_kernels_have_moved_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = WANTED[VLLM][0]
    monkeypatch.setattr(kernel_wheels, "_download", lambda requirement, folder: wheel(folder, without=moved))
    with pytest.raises(BenchError, match=r"vllm 0\.99 has no .*kernel_utils\.py: its kernels have moved"):
        install(tmp_path / "peers", VLLM)


def test_no_peer_files_are_in_git() -> None:
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(["git", "check-ignore", "-q", ".peers/vllm/VERSION"], cwd=root)
    assert done.returncode == 0
