"""Other projects' kernels, run as their servers run them, from files that ``scripts/bench lora --install-peers`` gets.

Nothing of theirs is in this project: adaptors prepare what their kernels take, and stand-ins provide the few names that
their files import from the rest of their packages.
"""

from pathlib import Path

VLLM, SGLANG = "vllm", "sglang"
WANTED: dict[str, tuple[str, ...]] = {
    VLLM: tuple(
        f"vllm/lora/ops/triton_ops/{name}.py"
        for name in ("kernel_utils", "lora_expand_op", "lora_kernel_metadata", "lora_shrink_op", "utils")
    ),
    SGLANG: (
        *(f"sglang/kernels/ops/lora/common/{name}.py" for name in ("lora_a", "lora_b", "route_view", "routing")),
        *(
            f"sglang/kernels/ops/lora/dense/{name}.py"
            for name in ("chunked_sgmv_expand", "chunked_sgmv_shrink", "lora_tuning_config")
        ),
        "sglang/kernels/ops/lora/dense/csgmv_configs/*",
        "sglang/srt/lora/dense/configs/*.plans.json",
    ),
}
"""Files of each wheel, as patterns. They lie in ``DIR/NAME`` under the paths that they have in the wheel."""
DEFAULT_FOLDER = Path(".peers")


def missing(folder: Path, name: str) -> list[str]:
    """What of a peer's files is not in ``folder / name``."""
    return [pattern for pattern in WANTED[name] if not any((folder / name).glob(pattern))]


def root_of(folder: Path, name: str) -> Path:
    """Where a peer's files are. Raises FileNotFoundError where they are not."""
    absent = missing(folder, name)
    if absent:
        raise FileNotFoundError(f"no {absent[0]} in {folder / name}; get it with: scripts/bench lora --install-peers")
    return folder / name


def version(folder: Path, name: str) -> str:
    """The version whose files these are."""
    path = folder / name / "VERSION"
    return path.read_text().strip() if path.exists() else "unknown"
