"""Writes adapter weights to safetensors files, and expands an adapter to a larger rank."""

import errno
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loraserve.errors import AdapterError


def save_weights(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write ``tensors`` to ``path`` with the default file permissions. Raises OSError if the disk is full or fails."""
    path.touch()
    # safetensors creates files that only this user can read. A server may run under another user.
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(number, str(error), str(path)) from error
    path.chmod(mode)


A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"


def expand_rank(src_dir: Path, dst_dir: Path, rank: int, seed: int) -> None:
    """Expand the PEFT adapter in ``src_dir`` to a larger ``rank`` and write it to the existing ``dst_dir`` in float32.

    The expanded adapter gives the same outputs. Each projection gets a random orthogonal matrix Q of shape
    ``[rank, rank]``. Then A' = Q [A; 0] and B' = [B, 0] Q^T, so B' A' = B A.
    Raises AdapterError if the rank would shrink, if it differs by layer, or if the adapter is not plain LoRA.
    """
    config = json.loads((src_dir / "adapter_config.json").read_text(encoding="utf-8"))
    check_expandable(config, rank)
    weights = load_file(src_dir / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    expanded: dict[str, torch.Tensor] = {}
    for name in sorted(weights):
        if name.endswith(A_SUFFIX):
            b_name = name.removesuffix(A_SUFFIX) + B_SUFFIX
            expanded[name], expanded[b_name] = rotate(weights[name], weights[b_name], rank, generator)
    if expanded.keys() != weights.keys():
        extra = sorted(weights.keys() - expanded.keys())[0]
        raise AdapterError("unsupported", f"tensor {extra!r} is not lora_A or lora_B; only plain LoRA can be expanded")
    save_weights(expanded, dst_dir / "adapter_model.safetensors")
    config = expanded_config(config, rank)
    (dst_dir / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_expandable(config: dict[str, Any], rank: int) -> None:
    """Raise AdapterError if the adapter is not plain LoRA of one rank, or if its rank is above ``rank``."""
    for field in ("rank_pattern", "alpha_pattern", "use_dora", "modules_to_save"):
        if config.get(field):
            raise AdapterError("unsupported", f"adapter_config.json field {field}: such an adapter cannot be expanded")
    if rank < config["r"]:
        raise AdapterError("bad_rank", f"rank {rank} is below the adapter's own {config['r']}; give a larger one")


def rotate(
    a: torch.Tensor, b: torch.Tensor, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expand ``a`` [r, in] to [rank, in] and ``b`` [out, r] to [out, rank], in float32, without changing b @ a."""
    noise = torch.randn(rank, rank, dtype=torch.float64, generator=generator)
    # Only the first r columns of Q are needed. The other columns are multiplied by the zero rows of [A; 0].
    q = torch.linalg.qr(noise).Q[:, : a.shape[0]]
    return (q @ a.double()).float().contiguous(), (b.double() @ q.T).float().contiguous()


def expanded_config(config: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return the PEFT configuration for ``rank``. The new alpha keeps the LoRA scale unchanged."""
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    alpha = config["lora_alpha"] / root * rank
    return config | {
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "use_rslora": False,
    }
