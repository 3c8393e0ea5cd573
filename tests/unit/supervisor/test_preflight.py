"""Checks before the start name the field and the remedy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loraserve.config import check_pins, load_config
from loraserve.errors import ConfigError
from loraserve.supervisor.preflight import check_disk, check_model, check_not_running
from loraserve.supervisor.state import RunState, write_state

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("pin", "text"),
    [
        ('["engine-0", "engine-7"]', r"planner\.pins\.legal: there is no engine 'engine-7'.* has engine-0, engine-1"),
        ("[]", r"planner\.pins\.legal names no engine.*engine-0, engine-1"),
    ],
)
def test_a_pin_to_an_engine_that_does_not_exist_is_named(pin: str, text: str) -> None:
    overrides = ["cluster.engines=2", f'planner.pins={{"legal": {pin}}}']
    with pytest.raises(ConfigError, match=text):
        check_pins(load_config(None, {}, overrides))
    check_pins(load_config(None, {}, ["cluster.engines=2", 'planner.pins={"legal": ["engine-1"]}']))


def test_a_running_cluster_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print(1, flush=True); input() # loraserve"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        write_state(tmp_path, RunState(pid=child.pid, url="http://x", log_dir="", model=""))
        with pytest.raises(ConfigError, match="already runs"):
            check_not_running(tmp_path)
    finally:
        child.kill()
        child.wait()
    check_not_running(tmp_path)


def test_a_small_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraserve.supervisor.preflight.NEEDED_BYTES", 1 << 60)
    with pytest.raises(ConfigError, match="MiB free"):
        check_disk(tmp_path)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "config.json"),
        ({"config.json": {**LLAMA, "model_type": "gpt2"}}, "model_type 'gpt2'"),
        ({"config.json": {**LLAMA, "hidden_size": "big"}}, "hidden_size"),
        ({"config.json": LLAMA}, "safetensors"),
        ({"config.json": LLAMA, "model.safetensors": {}}, "tokenizer"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused(tmp_path: Path, files: dict[str, object], complaint: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=complaint):
        check_model(tmp_path)
