"""The tensors of a Hugging Face directory, single file or sharded, read one at a time."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loraserve.errors import ConfigError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

REMEDY = "the directory must hold all of the model's files as they were published; fetch them again"


class Checkpoint:
    """Names and, one by one, values of a checkpoint's tensors. Files are mapped, so only what is taken is read."""

    def __init__(self, model_dir: Path) -> None:
        self._dir = model_dir
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for name in self._file_names():
            self._open(name)
        self._left = set(self._file_of)

    def _file_names(self) -> list[str]:
        index = self._dir / INDEX_FILE
        if not index.exists():
            if not (self._dir / SINGLE_FILE).exists():
                raise ConfigError(
                    f"{self._dir}: neither {SINGLE_FILE} nor {INDEX_FILE} is there; only safetensors are read"
                )
            return [SINGLE_FILE]
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            names = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index}: not an index of safetensors files ({error!r}); {REMEDY}") from error
        outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if outside:
            raise ConfigError(f"{index}: {outside[0]!r} is not a file of this directory; {REMEDY}")
        return names

    def _open(self, name: str) -> None:
        try:
            self._files[name] = safe_open(self._dir / name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self._dir / name}: {error}; {REMEDY}") from error
        for tensor in self._files[name].keys():  # noqa: SIM118 - not a mapping
            self._file_of[tensor] = name

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The tensor in its own dtype. Raises ConfigError where it is missing or of another shape or kind."""
        if name not in self._file_of:
            raise ConfigError(f"{self._dir}: tensor {name} is missing; {REMEDY}")
        tensor: torch.Tensor = self._files[self._file_of[name]].get_tensor(name)
        if tuple(tensor.shape) != tuple(shape):
            raise ConfigError(
                f"{self._dir}: tensor {name} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(shape)}; {REMEDY}"
            )
        if tensor.dtype not in DTYPES:
            raise ConfigError(f"{self._dir}: tensor {name} is {tensor.dtype}; use float32, bfloat16 or float16 weights")
        self._left.discard(name)
        return tensor

    def skip(self, name: str) -> None:
        """A tensor that may be there but is not needed."""
        self._left.discard(name)

    def assert_all_taken(self) -> None:
        """Raises ConfigError where a tensor is left: the model would compute something else than it was trained to."""
        if self._left:
            names = sorted(self._left)
            raise ConfigError(
                f"{self._dir}: {len(names)} tensors have no place in the model that config.json describes, "
                f"first {names[0]}; use the config.json that was published with these weights"
            )
