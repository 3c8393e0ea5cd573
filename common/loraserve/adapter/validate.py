"""Checks an adapter against its base model before it is packed.

Every refusal is an AdapterError whose message names the tensor or field and the remedy.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from loraserve.adapter.peft import (
    CONFIG_FILE,
    PICKLE_FILE,
    WEIGHTS_FILE,
    PeftConfig,
    Scaling,
    TensorName,
    parse_tensor_name,
)
from loraserve.adapter.tensor_file import TensorEntry
from loraserve.errors import AdapterError
from loraserve.model_shape import SLICES, ModelShape

MAX_NAME_CHARACTERS = 200


class LoraPair(msgspec.Struct, frozen=True):
    """The rank, scale and matrices of one projection: A ``[rank, in]`` and B ``[out, rank]``."""

    rank: int
    scale: float
    a: TensorEntry
    b: TensorEntry


def check_name(name: str, served_model: str) -> None:
    """Raise AdapterError ``bad_name`` if ``name`` is not a valid adapter name or is the served model's name."""
    if not name or len(name) > MAX_NAME_CHARACTERS:
        reason = f"must have 1 to {MAX_NAME_CHARACTERS} characters"
    elif not name.isprintable() or name != name.strip():
        reason = "must be printable, without control characters and without blanks at its ends"
    elif name == served_model:
        reason = "is the name of the base model; choose another"
    else:
        return
    raise AdapterError("bad_name", f"adapter name {name[:MAX_NAME_CHARACTERS]!r} {reason}")


def check_directory(directory: Path) -> None:
    """Raise AdapterError if the path is missing or no directory, or if its weights exist only as a pickle."""
    try:
        exists = directory.exists()
    except OSError as error:
        raise AdapterError("not_found", f"path {str(directory)[:200]}: {error.strerror}") from error
    if not exists:
        raise AdapterError("not_found", f"path {directory} does not exist where the store runs; name a PEFT directory")
    if not directory.is_dir():
        raise AdapterError("bad_format", f"path {directory} is not a directory; name the directory, not a file in it")
    if (directory / PICKLE_FILE).exists() and not (directory / WEIGHTS_FILE).exists():
        raise AdapterError(
            "unsupported",
            f"{PICKLE_FILE} is a pickle, which can run code when read; save the adapter with "
            "save_pretrained(..., safe_serialization=True)",
        )


def pair_matrices(
    config: PeftConfig, tensors: Mapping[str, TensorEntry], shape: ModelShape, max_rank: int
) -> dict[tuple[int, str], LoraPair]:
    """Return a dict that maps each (layer, projection) changed by the adapter to the projection's matrices.

    Raises AdapterError: ``unsupported`` for tensors that are no LoRA matrices, ``bad_format`` for missing or duplicate
    matrices, ``bad_shape`` if shapes do not fit the model, ``bad_rank`` if ranks disagree or exceed ``max_rank``.
    """
    found: dict[tuple[int, str], dict[str, tuple[TensorName, TensorEntry]]] = {}
    for name, entry in tensors.items():
        place = parse_tensor_name(name)
        matrices = found.setdefault((place.layer, place.projection), {})
        if place.matrix in matrices:
            raise AdapterError("bad_format", f"{matrices[place.matrix][1].name} and {name} are the same matrix twice")
        matrices[place.matrix] = (place, entry)
    if not found:
        raise AdapterError("bad_format", f"{WEIGHTS_FILE} holds no tensors; train the adapter before it is registered")
    scaling = Scaling(config)
    widths = dict(_widths(shape))
    return {key: _check_pair(matrices, scaling, shape.layers, widths, max_rank) for key, matrices in found.items()}


def _widths(shape: ModelShape) -> Iterator[tuple[str, tuple[int, int]]]:
    for module, projections in SLICES.items():
        for projection, out in zip(projections, shape.out_features(module), strict=True):
            yield projection, (shape.in_features(module), out)


def _check_pair(
    matrices: Mapping[str, tuple[TensorName, TensorEntry]],
    scaling: Scaling,
    layers: int,
    widths: Mapping[str, tuple[int, int]],
    max_rank: int,
) -> LoraPair:
    if len(matrices) == 1:
        ((matrix, (_, entry)),) = matrices.items()
        missing = "B" if matrix == "A" else "A"
        raise AdapterError("bad_format", f"{entry.name} has no lora_{missing} beside it; save the adapter again")
    place, a = matrices["A"]
    _, b = matrices["B"]
    if place.layer >= layers:
        raise AdapterError(
            "bad_shape", f"{a.name}: the model has layers 0 to {layers - 1}; the adapter is for another model"
        )
    width_in, width_out = widths[place.projection]
    _check_matrix(a, 1, width_in, "input")
    _check_matrix(b, 0, width_out, "output")
    rank = _check_rank(place.module, a, b, scaling, max_rank)
    return LoraPair(rank, scaling.scale(place.module, rank), a, b)


def _check_matrix(entry: TensorEntry, axis: int, width: int, side: str) -> None:
    if len(entry.shape) != 2 or entry.shape[axis] != width:
        raise AdapterError(
            "bad_shape",
            f"{entry.name} has shape {list(entry.shape)}; dimension {axis} must be the {side} width {width} of this "
            "model: the adapter is for another model",
        )


def _check_rank(module: str, a: TensorEntry, b: TensorEntry, scaling: Scaling, max_rank: int) -> int:
    rank, other = a.shape[0], b.shape[1]
    if rank != other:
        raise AdapterError("bad_rank", f"{a.name} has rank {rank}, its lora_B has {other}; save the adapter again")
    if not 1 <= rank <= max_rank:
        raise AdapterError(
            "bad_rank", f"{a.name} has rank {rank}; ranks from 1 to store.max_rank = {max_rank} are served"
        )
    if rank != scaling.rank(module):
        raise AdapterError(
            "bad_rank",
            f"{a.name} has rank {rank}, {CONFIG_FILE} says {scaling.rank(module)} (r, rank_pattern); use the "
            "configuration that was saved with these tensors",
        )
    return rank
