"""Defines the answer of /admin/cluster and formats it as text."""

import msgspec

from loraserve.messages import AdapterDemand, AdapterRef, EngineCapabilities, EngineCounters, EngineLoad, ReadCounts
from loraserve.ops.rendering import VERSION_CHARACTERS
from loraserve.text import bar, size, table

STALE_LOAD_S = 3.0


class GatewayState(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the gateway that sent the answer."""

    name: str
    streams: int
    model: str


class ProcessState(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of a process to a ping. ``state`` is UNREACHABLE if it did not answer."""

    state: str
    detail: str = ""
    pid: int | None = None


class EngineState(msgspec.Struct, frozen=True, kw_only=True):
    """The last reports of an engine. ``reads_from`` maps other engines to the usable transports, best first."""

    name: str
    alive: bool
    age_s: float
    load: EngineLoad
    capabilities: EngineCapabilities
    counters: EngineCounters = EngineCounters()
    reads_from: dict[str, tuple[str, ...]] = {}


class RegistryState(msgspec.Struct, frozen=True, kw_only=True):
    """The gateway's copy of the adapter registry."""

    revision: int
    adapters: tuple[AdapterRef, ...]


class ClusterAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /admin/cluster. Unknown fields of a newer gateway are ignored."""

    gateway: GatewayState
    processes: dict[str, ProcessState]
    load_age_s: float | None
    engines: tuple[EngineState, ...]
    demand: tuple[AdapterDemand, ...]
    plan_epoch: int | None
    drained: tuple[str, ...] = ()
    registry: RegistryState


def render(state: ClusterAnswer) -> str:
    parts = [summary(state), processes(state), engines(state), residents(state), reads(state), demand(state)]
    return "\n\n".join(part for part in parts if part)


def summary(state: ClusterAnswer) -> str:
    """Return a line with model, plan epoch and counts, and a warning if load reports are missing or old."""
    epoch = "unknown, the planner does not answer" if state.plan_epoch is None else str(state.plan_epoch)
    adapters = len(state.registry.adapters)
    streams = f"{state.gateway.streams} open streams"
    if any(name.startswith("gateway-") for name in state.processes):
        streams += f" on {state.gateway.name}"
    line = f"{state.gateway.model}   plan epoch {epoch}   {adapters} adapters   {streams}"
    if state.load_age_s is None:
        return f"{line}\nno load report has arrived: is the monitor up?"
    if state.load_age_s > STALE_LOAD_S:
        return f"{line}\nthe last load report is {state.load_age_s:.0f} s old: is the monitor up?"
    return line


def processes(state: ClusterAnswer) -> str:
    gateway = {state.gateway.name: ProcessState(state="READY", detail="sent this answer")}
    rows = [
        [name, process.state, "-" if process.pid is None else str(process.pid), process.detail]
        for name, process in {**state.processes, **gateway}.items()
    ]
    return table(["PROCESS", "STATE", "PID", ""], rows)


def engines(state: ClusterAnswer) -> str:
    return table(
        ["ENGINE", "ALIVE", "WAITING", "RUNNING", "KV CACHE", "ADAPTER POOL", "POOL USED", "DECODE STEP"],
        [_engine_row(engine, engine.name in state.drained) for engine in state.engines],
    )


def left_to_drain(load: EngineLoad) -> tuple[int, int]:
    """Return the number of requests and the number of planned (pinned) adapter copies of an engine."""
    return load.queue.running + load.queue.waiting, sum(adapter.pinned for adapter in load.adapters.resident)


def engine_state(engine: EngineState, drained: bool) -> str:
    """Return the ALIVE column: a dead engine's seconds of silence, DRAINING or DRAINED, or the engine's own state."""
    if not engine.alive:
        return f"no, silent for {engine.age_s:.0f} s"
    if drained and engine.load.state == "READY":
        return "DRAINING" if any(left_to_drain(engine.load)) else "DRAINED"
    return engine.load.state


def _engine_row(engine: EngineState, drained: bool) -> list[str]:
    load, limits = engine.load, engine.capabilities
    pool_used = limits.pool_bytes - load.memory.pool_free_bytes
    return [
        engine.name,
        engine_state(engine, drained),
        str(load.queue.waiting),
        str(load.queue.running),
        bar(limits.kv_blocks - load.memory.kv_blocks_free, limits.kv_blocks),
        bar(pool_used, limits.pool_bytes),
        size(pool_used),
        f"{load.speed.decode_step_s * 1000:.1f} ms" if load.speed.decode_step_s else "-",
    ]


def residents(state: ClusterAnswer) -> str:
    """Return a title and one line per engine: resident (``name:rank``, * if pinned) and loading adapters."""
    if not state.engines:
        return ""
    lines = ["RESIDENT (adapter:rank, * pinned)"]
    width = max(len(engine.name) for engine in state.engines)
    names = {adapter.version: adapter.name for adapter in state.registry.adapters}
    for engine in state.engines:
        held = sorted(engine.load.adapters.resident, key=lambda adapter: (adapter.name, adapter.version))
        words = [f"{a.name}:{a.rank}" + "*" * a.pinned for a in held]
        loading = (names.get(version, version[:VERSION_CHARACTERS]) for version in engine.load.adapters.loading)
        words += [f"{name} (loading)" for name in loading]
        lines.append(f"{engine.name:<{width}}  {'  '.join(words) or '-'}")
    return "\n".join(lines)


def reads(state: ClusterAnswer) -> str:
    """Return a table of each engine's adapter reads by source, including engines that it has not read from yet."""
    rows = []
    for engine in state.engines:
        done = {(read.source, read.transport): read for read in engine.counters.reads}
        preferred = {(peer, transports[0]) for peer, transports in engine.reads_from.items() if transports}
        for source, transport in sorted(done.keys() | preferred):
            read = done.get((source, transport)) or ReadCounts(source=source, transport=transport)
            rate = f"{size(read.predicted_bytes_per_s)}/s" if read.predicted_bytes_per_s else "-"
            figures = [str(read.reads), size(read.read_bytes), rate, str(read.failed), str(read.mismatched)]
            rows.append([engine.name, source, transport, *figures])
    return table(["READS", "FROM", "OVER", "READS", "BYTES", "RATE", "FAILED", "MISMATCHED"], rows) if rows else ""


def demand(state: ClusterAnswer) -> str:
    """Return a table of the adapters with recent requests, highest forecast first."""
    if not state.demand:
        return "DEMAND\nno adapter has been requested recently"
    ordered = sorted(state.demand, key=lambda d: (-d.forecast_tokens_per_s, d.name))
    return table(
        ["DEMAND", "RANK", "REQUESTS/S", "PREFILL TOKENS/S", "DECODE TOKENS/S", "FORECAST TOKENS/S"],
        [
            [
                d.name or d.version[:VERSION_CHARACTERS] or "(base model)",
                str(d.rank) if d.rank else "-",
                f"{d.requests_per_s:.2f}",
                f"{d.prefill_tokens_per_s:.1f}",
                f"{d.decode_tokens_per_s:.1f}",
                f"{d.forecast_tokens_per_s:.1f}",
            ]
            for d in ordered
        ],
    )
