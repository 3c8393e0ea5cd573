"""Cost profiles. A profile is a cost model with its origin, its base model and hardware, and its errors.

Profiles are JSON files. ``profiles/`` contains the shipped profiles.
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
"""A profile's pool must fit an adapter of this rank."""


class Efficiency(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fraction of a datasheet figure that real kernels reach, or another input of ``derive_profile``.

    ``source`` says where ``value`` was published or how it was measured or assumed.
    """

    value: float
    source: str


class Residuals(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Quantiles of |predicted - measured| / measured over the steps that the fit did not use."""

    samples: int
    held_out: int
    median: float
    p90: float


class EngineShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The capacities of an engine on the profile's hardware, for the simulator."""

    kv_blocks: int
    block_tokens: int
    pool_bytes: int
    max_running: int
    max_step_tokens: int
    max_model_tokens: int
    slab_bytes_per_rank: int
    kv_bytes_per_token: int = 0


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cost profile. ``date`` is ISO 8601. ``hardware`` is the name of the GPU or CPU.

    ``origin`` derived means that datasheets and ``efficiencies`` give the costs, without running the model.
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
    """Read a profile from a JSON file or by the name of a shipped one. Raises ConfigError, which names the file."""
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
    fault = _fault(profile)
    if fault:
        raise ConfigError(f"cost profile {path}: {fault}; {REMEDY}")
    return profile


def write_profile(profile: Profile, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(profile)) + b"\n")


def check_model(profile: Profile, shape: ModelShape, name: str = "") -> None:
    """Raise ConfigError if the profile's model does not have ``shape``. The message calls the profile ``name``."""
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
    """Return the profile that ``cluster.profile`` names. For "", return a shipped profile or None.

    A shipped profile must have this model's shape, this kind of device and ``exact`` LoRA kernels. Profiles for this
    GPU are preferred, then measured ones. Raises ConfigError if a named profile is unreadable or for another model.
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
    """Return the cost model of the profile from ``find_profile``, or the default model. Raises ConfigError."""
    profile = find_profile(config)
    return profile.cost if profile else CostModel()


def _shape(model_dir: str) -> ModelShape | None:
    try:
        return shape_from_config(read_model_config(Path(model_dir))) if model_dir else None
    except ConfigError:
        # The processes that load the model report the error.
        return None


def _fault(profile: Profile) -> str:
    """Describe the first invalid field of ``profile``. Return "" if all are valid."""
    for field, value in msgspec.structs.asdict(profile.cost).items():
        if field != "lora" and not (isfinite(value) and value >= 0):
            return f"cost.{field} is {value}, but must be finite and not negative"
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
    """Describe a memory size that is too small, with the remedy. Return "" if all are large enough.

    A KV cache smaller than the longest context is valid. It limits the length of requests.
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
