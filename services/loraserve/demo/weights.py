"""Writing safetensors files that others can read, with failures that callers can tell apart."""

import errno
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def save_weights(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes ``tensors`` to ``path``, readable as any new file is. Raises OSError when the disk refuses."""
    path.touch()
    # safetensors makes its files private, which a server under another user could not open
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(number, str(error), str(path)) from error
    path.chmod(mode)
