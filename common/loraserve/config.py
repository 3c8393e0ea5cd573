"""The configuration: one frozen struct per section, read from a TOML file, the environment and flags.

Each source overrides the one before it: defaults, the TOML file, ``LORASERVE_SECTION__KEY`` in the environment,
``--set section.key=value``. A key that no section defines is an error.
"""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from loraserve.device import default_engines
from loraserve.errors import ConfigError

ENV_PREFIX = "LORASERVE_"
PLACE = re.compile(r"`\$\.(\w+\.\w+)")
"""Matches the name of the invalid setting in an error message of msgspec."""

MAX_SLAB_READ_BYTES = 16 << 20
"""The store refuses a ReadSlab request for more bytes."""

Natural = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
# The upper bound also excludes infinity and NaN.
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]
Factor = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of the sections."""


class BusConfig(Section, frozen=True, kw_only=True):
    """Address templates. ``{name}`` stands for the process name, ``{run_dir}`` for the cluster's private folder.

    Peers connect to ``connect`` (the inbox) and ``connect_pub`` (publications). The process binds ``bind`` and
    ``bind_pub``, or the connect addresses if these are "". ``peers`` maps process names to ``"inbox,publications"``
    addresses that replace the connect templates. Peers are not authenticated: each of them can send commands.
    """

    connect: str = "ipc://{run_dir}/{name}.sock"
    connect_pub: str = "ipc://{run_dir}/{name}.pub"
    bind: str = ""
    bind_pub: str = ""
    peers: dict[str, str] = msgspec.field(default_factory=dict)
    queue_messages: Positive = 20_000


class ClusterConfig(Section, frozen=True, kw_only=True):
    """Settings of the whole cluster. ``engines`` 0 means one engine per GPU, or two engines on a CPU.

    The ``gateways`` share one port.

    ``profile`` gives the router and the planner their initial cost model. It is the path of a file written by
    scripts/profile or the name of a shipped profile. "" selects the shipped profile for this model and device, if any.
    """

    engines: Natural = 0
    gateways: Positive = 1
    profile: str = ""
    run_dir: str = ""
    data_dir: str = ""
    log_dir: str = ""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "json"


class ModelConfig(Section, frozen=True, kw_only=True):
    """``path`` is a local Hugging Face directory. ``name`` is the model name for clients; "" means the folder name."""

    path: str = ""
    name: str = ""
    max_model_tokens: Natural = 0
    """Most prompt and output tokens of one request. 0 means the model's limit, or the KV cache's capacity if lower."""


class EngineConfig(Section, frozen=True, kw_only=True):
    """Settings of each engine. ``device`` auto selects a GPU if there is one.

    On a CPU, ``weights`` float32 is exact. fp16 halves the weight bytes and computes with float32 activations. auto
    selects the faster supported type. ``kv_bytes`` and ``pool_bytes`` are the sizes of the KV cache and adapter pool.
    The pool's pages are allocated at start while at least a quarter of the machine's memory is available.

    On a GPU, ``weights`` must be the type of ``slab_dtype``, or auto. The engine uses ``memory_fraction`` of the GPU's
    memory. The adapter pool gets ``pool_fraction`` of what remains after weights and steps. The KV cache gets the rest.

    Each engine keeps evicted adapters in a host cache of ``host_cache_bytes``, page-locked if it has a GPU. Loads from
    this cache are faster than from the store. 0 means no cache. auto means no cache on a CPU; on a GPU it means 8 GiB,
    limited so that all engines together use at most a quarter of the machine's memory.

    ``threads`` 0 means cores / engines, at least 1. ``digest_threads`` threads verify adapters during loads. 0 means
    cores / engines / 2 on a GPU, or cores / engines - ``threads`` on a CPU, but at least 1 and at most 8.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    weights: Literal["auto", "float32", "fp16", "bf16"] = "auto"
    slab_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    threads: Natural = 0
    digest_threads: Natural = 0
    kv_bytes: Positive = 1 << 30
    block_tokens: Positive = 16
    pool_bytes: Positive = 512 << 20
    memory_fraction: Share = 0.9
    pool_fraction: Share = 0.3
    host_cache_bytes: Natural | Literal["auto"] = "auto"
    max_adapters: Positive = 64
    max_rank: Positive = 256
    max_running: Positive = 64
    max_waiting: Positive = 1024
    max_step_tokens: Positive = 512
    prefix_cache: bool = True
    load_interval_s: Seconds = 0.25
    statistics_interval_s: Seconds = 1.0
    load_timeout_s: Seconds = 60.0
    load_chunk_bytes: Positive = 1 << 20
    drain_timeout_s: Seconds = 3.0
    """Time for requests to end after SIGTERM. The gateways then migrate the remaining ones to other engines."""

    def __post_init__(self) -> None:
        if self.load_chunk_bytes > MAX_SLAB_READ_BYTES:
            raise ValueError(
                f"engine.load_chunk_bytes is {self.load_chunk_bytes}, the store sends at most {MAX_SLAB_READ_BYTES} "
                "bytes at a time; lower it"
            )


class RouterConfig(Section, frozen=True, kw_only=True):
    """``policy`` predicted selects the lowest predicted TTFT; shares draws engines in proportion to traffic shares."""

    policy: Literal["predicted", "shares"] = "predicted"
    admit_timeout_s: Seconds = 1.0
    slo_ttft_s: Seconds = 10.0
    reject_factor: Factor = 4.0


class MonitorConfig(Section, frozen=True, kw_only=True):
    publish_interval_s: Seconds = 0.25
    dead_after_s: Seconds = 1.5
    window_s: Seconds = 60.0


class PlannerConfig(Section, frozen=True, kw_only=True):
    """``policy`` loraserve is from arXiv:2511.22880. ``pins`` maps adapters to the engines that must hold them."""

    policy: Literal["ours", "loraserve"] = "ours"
    pins: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    interval_s: Seconds = 30.0
    min_copies: Positive = 1
    prepare_timeout_s: Seconds = 60.0


class StoreConfig(Section, frozen=True, kw_only=True):
    """``adapters`` maps names to PEFT folders that the store registers at start. It logs and skips invalid adapters.

    ``allowed_dirs`` lists the folders from which adapters may be registered. An empty list allows all folders.
    """

    max_rank: Positive = 256
    adapters: dict[str, str] = msgspec.field(default_factory=dict)
    allowed_dirs: tuple[str, ...] = ()
    publish_interval_s: Seconds = 2.0


class GatewayConfig(Section, frozen=True, kw_only=True):
    host: str = "127.0.0.1"
    port: Port = 8000
    listen_fd: Annotated[int, msgspec.Meta(ge=-1)] = -1
    """Number of an inherited, bound socket to listen on in place of ``host`` and ``port``. scripts/up sets it. -1 means
    that the gateway binds a socket itself."""
    api_keys: tuple[str, ...] = ()
    default_max_tokens: Natural = 0
    """Output limit of requests that do not set one. 0 means the rest of the context."""
    request_timeout_s: Seconds = 600.0
    route_timeout_s: Seconds = 10.0
    """The gateway asks the router again after this time without an answer, until the request's deadline."""
    max_attempts: Positive = 8
    """Most engines that run a request one after the other, if they die or fail it. Engines that drain after they added
    to the output do not count."""
    migrate_timeout_s: Seconds = 30.0
    """Longest time to find another engine for a request whose engine died or failed it."""
    drain_timeout_s: Seconds = 8.0
    """Time for streams to finish after SIGTERM. Docker kills a container ten seconds after SIGTERM."""
    max_body_bytes: Positive = 16 << 20
    max_free_json_bytes: Positive = 1 << 20
    """Limit of a request's ``tool_calls`` in total, of its ``function_call`` in total and of its
    ``chat_template_kwargs``. All of them may hold any JSON."""
    expect_characters: Positive = 4000
    """The gateway announces prompts of at least this length to the router before it tokenizes them, so that an engine
    can load the adapter during tokenization (2 ms or more)."""


class TransferConfig(Section, frozen=True, kw_only=True):
    """How engines read adapters from each other.

    Engines use the ``transports`` that both sides support. An engine loads adapters that are not in its host cache from
    peers or the store. It tries the source with the shortest predicted time first. Without transports, it uses no peer.

    ``lease_s`` is how long a peer's lease on an adapter lasts unless the peer renews it. Renewals can extend a lease
    to ``engine.load_timeout_s`` in total.
    """

    transports: tuple[Literal["cuda_ipc", "shm", "verbs", "tcp"], ...] = ("cuda_ipc", "shm", "verbs", "tcp")
    lease_s: Seconds = 5.0


class Config(Section, frozen=True, kw_only=True):
    bus: BusConfig = BusConfig()
    cluster: ClusterConfig = ClusterConfig()
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    router: RouterConfig = RouterConfig()
    monitor: MonitorConfig = MonitorConfig()
    planner: PlannerConfig = PlannerConfig()
    store: StoreConfig = StoreConfig()
    gateway: GatewayConfig = GatewayConfig()
    transfer: TransferConfig = TransferConfig()


def load_config(
    path: Path | None = None, environ: Mapping[str, str] = os.environ, overrides: Sequence[str] = ()
) -> Config:
    """Merge file, environment and overrides. Raises ConfigError, which names the invalid key and its source."""
    merged = {} if path is None else _read_toml(path)
    sources: dict[str, str] = {}
    for name, value in sorted(environ.items()):
        if name.startswith(ENV_PREFIX) and "__" in name:
            key = name.removeprefix(ENV_PREFIX).lower().replace("__", ".", 1)
            sources[key] = f"environment {name}"
            _assign(merged, key, value, sources[key])
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: write section.key=value")
        key = name.strip()
        sources[key] = f"--set {text}"
        _assign(merged, key, value, sources[key])
    return _convert(merged, sources)


def engine_names(config: Config) -> tuple[str, ...]:
    return tuple(f"engine-{index}" for index in range(engine_count(config)))


def gateway_names(config: Config) -> tuple[str, ...]:
    return tuple(f"gateway-{index}" for index in range(config.cluster.gateways))


def engine_count(config: Config) -> int:
    return config.cluster.engines or default_engines(config.engine.device)


def check_pins(config: Config) -> None:
    """Raise ConfigError if an entry of ``planner.pins`` lists no engines or an engine that does not exist."""
    names = engine_names(config)
    for adapter, engines in config.planner.pins.items():
        field = f"planner.pins.{adapter}"
        if not engines:
            raise ConfigError(f"{field} names no engine; name some of {', '.join(names)}, or leave the pin out")
        for engine in engines:
            if engine not in names:
                raise ConfigError(f"{field}: there is no engine {engine!r}; this cluster has {', '.join(names)}")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"configuration file {path}: {error}") from error


def _assign(into: dict[str, Any], key: str, text: str, source: str) -> None:
    section, dot, name = key.partition(".")
    if not dot:
        raise ConfigError(f"{source}: write section.key, such as engine.pool_bytes")
    value: Any = text
    if text.startswith(("[", "{")):
        try:
            value = msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{source}: {error}") from error
    values = into.setdefault(section, {})
    if not isinstance(values, dict):
        raise ConfigError(f"configuration: {section} is a section; write [{section}] and its keys below")
    values[name] = value


def _convert(merged: dict[str, Any], sources: Mapping[str, str]) -> Config:
    try:
        return msgspec.convert(merged, Config, strict=False)
    except msgspec.ValidationError as error:
        place = PLACE.search(str(error))
        source = sources.get(place[1], "configuration") if place else "configuration"
        raise ConfigError(f"{source}: {error}; see the fields in loraserve/config.py") from error


def to_toml(config: Config) -> str:
    """Return the configuration as TOML. ``load_config`` reads an equal Config from it."""
    lines: list[str] = []
    for section, values in msgspec.to_builtins(config).items():
        scalars = {k: v for k, v in values.items() if not isinstance(v, dict)}
        lines.append(f"[{section}]")
        lines.extend(f"{k} = {_json(v)}" for k, v in scalars.items())
        for key, table in values.items():
            if isinstance(table, dict) and table:
                lines.append(f"\n[{section}.{key}]")
                lines.extend(f"{_json(k)} = {_json(v)}" for k, v in table.items())
        lines.append("")
    return "\n".join(lines)


def _json(value: Any) -> str:
    # JSON and TOML write strings, numbers, booleans and flat lists alike, except that TOML must escape DEL (U+007F).
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
