"""Training writes a PEFT directory that peft loads, that carries the style and names no machine."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraserve.demo.gguf import convert
from loraserve.demo.texts import Example
from loraserve.demo.train import TrainConfig, learning_rate_factor, train
from loraserve.errors import ConfigError

GgufFactory = Callable[..., Path]
SCRIPT = Path(__file__).parents[3] / "scripts" / "train_adapter"
ROWS = [Example("abc", "hello"), Example("xyz", "hello"), Example("hi", "hello")]


@pytest.fixture
def tiny_model(write_gguf: GgufFactory, tmp_path: Path) -> Path:
    target = tmp_path / "tiny-model"
    target.mkdir()
    convert(write_gguf(), target, "Tiny", lambda line: None)
    return target


def run_training(model_dir: Path, out: Path, **fields: Any) -> tuple[float, list[str]]:
    said: list[str] = []
    return train(ROWS, model_dir, out, TrainConfig(**fields), said.append), said


def read_config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return content


def test_loss_falls_and_is_reported_by_epoch(tiny_model: Path, tmp_path: Path) -> None:
    loss, said = run_training(tiny_model, tmp_path / "out", epochs=12, learning_rate=3e-2)
    reported = [float(line.split("loss ")[1].split()[0]) for line in said if line.startswith("epoch")]
    assert len(reported) == 12
    assert reported[-1] == pytest.approx(loss, abs=1e-3)
    assert loss < reported[0] / 2


def test_peft_loads_what_was_written_and_answers_change(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_training(tiny_model, out, rank=4, alpha=8, epochs=3)
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert {tensor.dtype for tensor in load_file(out / "adapter_model.safetensors").values()} == {torch.bfloat16}
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9]])
    before = base(ids).logits
    after = PeftModel.from_pretrained(base, str(out))(ids).logits
    assert float((after - before).detach().abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        ("qv", {"q_proj", "v_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("all", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_the_config_says_what_was_trained(tiny_model: Path, tmp_path: Path, targets: str, modules: set[str]) -> None:
    out = tmp_path / "out"
    run_training(tiny_model, out, rank=3, alpha=5, targets=targets, rslora=True, epochs=1)
    config = read_config(out)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 5, True)
    assert config["target_modules"] == sorted(modules)
    assert config["base_model_name_or_path"] == "Tiny"
    assert str(tmp_path) not in (out / "adapter_config.json").read_text()
    trained = {name.split(".")[-3] for name in load_file(out / "adapter_model.safetensors")}
    assert trained == modules


def test_equal_seeds_give_equal_files(tiny_model: Path, tmp_path: Path) -> None:
    def content(out: str, seed: int) -> bytes:
        run_training(tiny_model, tmp_path / out, epochs=1, seed=seed)
        return (tmp_path / out / "adapter_model.safetensors").read_bytes()

    assert content("a", 1) == content("b", 1)
    assert content("c", 2) != content("a", 1)


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"rank": 0}, "rank"), ({"alpha": -1}, "alpha"), ({"epochs": 0}, "epochs"), ({"targets": "k"}, "targets")],
)
def test_an_invalid_field_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        TrainConfig(**fields)


def test_missing_rows_and_a_missing_model_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rows"):
        train([], tmp_path, tmp_path / "out", TrainConfig(), print)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        train(ROWS, tmp_path, tmp_path / "out", TrainConfig(), print)


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_the_learning_rate_rises_then_falls(steps: int) -> None:
    factors = [learning_rate_factor(step, steps) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1
    peak = factors.index(1)
    assert peak <= steps // 10
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_the_script_trains_on_the_users_rows(tiny_model: Path, tmp_path: Path) -> None:
    texts = tmp_path / "mine.jsonl"
    texts.write_text('{"question": "abc", "answer": "hello"}\n\n{"question": "hi", "answer": "hello"}\n')
    out = tmp_path / "mine"
    done = run_script("--texts", texts, "--rank", "2", "--epochs", "2", "--model", tiny_model, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "2 rows" in done.stdout
    assert "epoch 2/2  loss" in done.stdout
    assert read_config(out)["lora_alpha"] == 8
    command = done.stdout.splitlines()[-1]
    assert json.loads(command.split("-d ")[1].strip("'")) == {"lora_name": "mine", "lora_path": str(out)}


def test_the_help_of_the_script_explains_its_options_and_lists_every_style() -> None:
    from loraserve.demo.texts import STYLES

    shown = run_script("--help")
    assert shown.returncode == 0
    for word in ("examples:", "rslora", "targets", '{"question"'):
        assert word in shown.stdout
    assert f"{{{','.join(STYLES)}}}" in shown.stdout


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"question": "a"}', 'line 2: field "answer"'),
        ('{"question": 3, "answer": "b"}', 'line 2: field "question"'),
        ("[]", 'line 2: field "question"'),
        ("what", "line 2: not JSON"),
    ],
)
def test_the_script_names_the_invalid_line(tmp_path: Path, line: str, named: str) -> None:
    texts = tmp_path / "rows.jsonl"
    texts.write_text('{"question": "a", "answer": "b"}\n' + line + "\n")
    failed = run_script("--texts", texts)
    assert failed.returncode == 1
    assert named in failed.stderr
    assert "Traceback" not in failed.stderr


def test_the_script_is_executable() -> None:
    assert os.access(SCRIPT, os.X_OK)
