"""A cost model with where it comes from: the model and hardware it is of, how it was found, how far off it is.

JSON on disk; the shipped ones lie in ``profiles/``. Read once at start.
"""

from math import isfinite
from pathlib import Path
from typing import Literal

import msgspec

from loraserve.config import Config
from loraserve.cost.extents import extent_bytes, largest_extent_bytes
from loraserve.cost.model import CostModel, StepShape
from loraserve.device import Device, gpu_name, resolve_device
from loraserve.errors import ConfigError
from loraserve.model_shape import ModelShape, read_model_config, shape_from_config

SHIPPED = Path(__file__).parent / "profiles"
REMEDY = "measure one with scripts/profile"
ONE_SEQUENCE = StepShape(decode_sequences=1)
LEAST_RANK = 8
"""Of adapters: a pool without room for one serves none."""


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
    """``origin`` derived: from datasheets and ``efficiencies``, never run. ``date`` is ISO 8601.

    ``device`` is the kind that ``hardware`` names one of.
    """

    model: str
    shape: ModelShape
    hardware: str
    date: str
    origin: Literal["measured", "derived"]
    cost: CostModel
    engine: EngineShape
    device: Device = "cuda"
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
        raise ConfigError(f"cost profile {path}: {error}; {REMEDY}") from error
    nonsense = _nonsense(profile)
    if nonsense:
        raise ConfigError(f"cost profile {path}: {nonsense}; {REMEDY}")
    return profile


def write_profile(profile: Profile, path: Path) -> None:
    """Raises OSError where the disk refuses."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(profile)) + b"\n")


def check_model(profile: Profile, shape: ModelShape, name: str = "") -> None:
    """Raises ConfigError where ``profile``, called ``name`` in the message, is of a model of another shape."""
    if profile.shape == shape:
        return
    ours, theirs = msgspec.structs.asdict(shape), msgspec.structs.asdict(profile.shape)
    differing = [field for field in ours if ours[field] != theirs[field]]
    raise ConfigError(
        f"cost profile {name or profile.model} is for another model: it is of {profile.model} with "
        f"{_fields(theirs, differing)}, the model here has {_fields(ours, differing)}; {REMEDY} and name it in "
        'cluster.profile, or leave cluster.profile ""'
    )


def find_profile(config: Config) -> Profile | None:
    """What ``cluster.profile`` says; for "" the shipped one of this model and kind of device.

    Of several that of this very GPU, then a measured one; None where there is none. Raises ConfigError where a profile
    that is named cannot be read or is for another model; a process that has no model directory takes its word for it.
    """
    name = config.cluster.profile
    shape = _shape(config.model.path)
    if name:
        profile = read_profile(name)
        if shape is not None:
            check_model(profile, shape, name)
        return profile
    device = resolve_device(config.engine.device)
    shipped = [read_profile(str(path)) for path in sorted(SHIPPED.glob("*.json"))] if shape else []
    fitting = [p for p in shipped if p.shape == shape and p.device == device and p.cost.lora == "exact"]
    here = gpu_name()
    return min(fitting, key=lambda p: (p.hardware != here, p.origin != "measured"), default=None)


def initial_cost_model(config: Config) -> CostModel:
    """What to price with before anything is measured: the profile's cost, or the defaults. Raises as profile_for."""
    profile = find_profile(config)
    return profile.cost if profile else CostModel()


def _shape(model_dir: str) -> ModelShape | None:
    try:
        return shape_from_config(read_model_config(Path(model_dir))) if model_dir else None
    except ConfigError:
        # Whoever needs the model says so; to price with is not worth failing for.
        return None


def _nonsense(profile: Profile) -> str:
    """Which field cannot be, and why; "" where all can."""
    for field, value in msgspec.structs.asdict(profile.cost).items():
        if field != "lora" and not (isfinite(value) and value >= 0):
            return f"cost.{field} is {value}, it must be finite and not negative"
    if not profile.cost.step_s(ONE_SEQUENCE) > 0:
        return "cost: a step takes no time"
    engine = profile.engine
    for field, value in msgspec.structs.asdict(engine).items():
        least = 0 if field in ("pool_bytes", "kv_bytes_per_token") else 1
        if value < least:
            return f"engine.{field} is {value}, it must be at least {least}"
    if engine.max_step_tokens < engine.max_running:
        return f"engine.max_step_tokens is {engine.max_step_tokens}, less than engine.max_running {engine.max_running}"
    unfit = _unfit(engine)
    if unfit:
        return unfit
    for field, value in msgspec.structs.asdict(profile.shape).items():
        if value < 1:
            return f"shape.{field} is {value}, it must be at least 1"
    return ""


def _unfit(engine: EngineShape) -> str:
    """Return what the memory has no room for, with the remedy.

    A KV cache shorter than the longest context is no fault: it limits the longest request.
    """
    kv_tokens = engine.kv_blocks * engine.block_tokens
    if kv_tokens < engine.max_step_tokens:
        return (
            f"engine.kv_blocks is {engine.kv_blocks}, room for {kv_tokens} tokens and not for one step of "
            f"engine.max_step_tokens {engine.max_step_tokens}; give the KV cache more memory"
        )
    needed_bytes = extent_bytes(LEAST_RANK * engine.slab_bytes_per_rank)
    if largest_extent_bytes(engine.pool_bytes) < needed_bytes:
        return (
            f"engine.pool_bytes is {engine.pool_bytes}, no room for an adapter of rank {LEAST_RANK}, an extent of "
            f"{needed_bytes} bytes by engine.slab_bytes_per_rank {engine.slab_bytes_per_rank}; give it more memory"
        )
    return ""


def _fields(values: dict[str, int], names: list[str]) -> str:
    return ", ".join(f"{name} {values[name]}" for name in names)
