"""A cost model with where it comes from: the model and hardware it is of, how it was found, how far off it is.

JSON on disk; the shipped ones lie in ``profiles/``. Read once at start.
"""

from pathlib import Path
from typing import Literal

import msgspec

from loraserve.cost.model import CostModel
from loraserve.errors import ConfigError
from loraserve.model_shape import ModelShape

SHIPPED = Path(__file__).parent / "profiles"


class Efficiency(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A share of the datasheet's figure that real kernels reach, or another number that is no datasheet's.

    ``source``: the file of this repository it was measured with, or the publication.
    """

    value: float
    source: str


class Residuals(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Relative errors |predicted - measured| / measured on batches that the fit has not seen."""

    samples: int
    held_out: int
    median: float
    p90: float


class EngineShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine on this hardware has: for the simulator, which has no engine to ask."""

    kv_blocks: int
    block_tokens: int
    pool_bytes: int
    max_running: int
    max_step_tokens: int
    max_model_tokens: int
    slab_bytes_per_rank: int
    kv_bytes_per_token: int = 0


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``origin`` derived: from datasheets and ``efficiencies``, never run. ``date`` is ISO 8601."""

    model: str
    shape: ModelShape
    hardware: str
    date: str
    origin: Literal["measured", "derived"]
    cost: CostModel
    engine: EngineShape
    residuals: Residuals | None = None
    efficiencies: dict[str, Efficiency] = msgspec.field(default_factory=dict)


def read_profile(name_or_path: str) -> Profile:
    """A file, or a shipped profile by its name. Raises ConfigError naming the file and what is wrong with it."""
    path = Path(name_or_path)
    if path.suffix != ".json" and "/" not in name_or_path:
        path = SHIPPED / f"{name_or_path}.json"
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
    except FileNotFoundError as error:
        known = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.json")))
        raise ConfigError(f"cost profile {name_or_path}: there is no such file; shipped ones are {known}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cost profile {path}: {error}; measure a new one with scripts/profile") from error
    return profile


def write_profile(profile: Profile, path: Path) -> None:
    """Raises OSError where the disk refuses."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(profile)) + b"\n")
