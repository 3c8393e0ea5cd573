"""The kernels of vLLM and SGLang, run as their servers run them, from files of their wheels.

``scripts/bench lora --install-peers`` gets the files. None of their code is in this project: adaptors prepare what
their kernels take, and stand-ins provide the few names that their files import from the rest of their packages.
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
"""Patterns of the files of each wheel. They lie in ``DIR/NAME`` under the paths that they have in the wheel."""
DEFAULT_FOLDER = Path(".peers")


def missing(folder: Path, name: str) -> list[str]:
    """Return the patterns of a peer's files that ``folder / name`` lacks."""
    return [pattern for pattern in WANTED[name] if not any((folder / name).glob(pattern))]


def root_of(folder: Path, name: str) -> Path:
    """Return the folder of a peer's files. Raises FileNotFoundError if some are missing."""
    absent = missing(folder, name)
    if absent:
        raise FileNotFoundError(f"no {absent[0]} in {folder / name}; get it with: scripts/bench lora --install-peers")
    return folder / name


def version(folder: Path, name: str) -> str:
    """Return the version of a peer's files."""
    path = folder / name / "VERSION"
    return path.read_text().strip() if path.exists() else "unknown"
