"""Checks before a cluster starts: no other cluster in the folder, the disk and the model."""

import shutil
from pathlib import Path

from loraserve.errors import ConfigError
from loraserve.model_shape import read_model_config, shape_from_config
from loraserve.supervisor.state import is_ours, read_state

NEEDED_BYTES = 1 << 30


def check_not_running(run_dir: Path) -> None:
    """Raise ConfigError if a cluster already runs with the run folder ``run_dir``."""
    state = read_state(run_dir)
    if state is not None and is_ours(state.pid):
        raise ConfigError(
            f"a cluster already runs here (pid {state.pid}, {state.url}); stop it with scripts/down, "
            "or start another with --data DIR --port N"
        )


def check_disk(folder: Path) -> None:
    """Raise ConfigError if the disk of ``folder`` has less than NEEDED_BYTES free."""
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise ConfigError(
            f"{folder} has {free >> 20} MiB free and {NEEDED_BYTES >> 20} MiB are needed; free some space or choose "
            "another disk with --data DIR"
        )


def check_model(model_dir: Path) -> None:
    """Raise ConfigError if the directory contains no model that engines can serve."""
    shape_from_config(read_model_config(model_dir))
    if not any(model_dir.glob("*.safetensors")):
        raise ConfigError(f"{model_dir}: no *.safetensors file; --model needs weights in the safetensors format")
    if not (model_dir / "tokenizer.json").exists() and not (model_dir / "tokenizer_config.json").exists():
        raise ConfigError(f"{model_dir}: no tokenizer.json; --model needs the tokenizer beside the weights")
