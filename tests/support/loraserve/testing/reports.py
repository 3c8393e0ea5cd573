"""Messages for tests: reports of an idle engine, adapters, demand, cluster loads and requests."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from loraserve.messages import (
    AdapterDemand,
    AdapterRef,
    AdapterState,
    AdapterTokens,
    ClusterLoad,
    EngineCapabilities,
    EngineCounters,
    EngineLoad,
    EngineSeen,
    EngineStatistics,
    MeanLoad,
    MeanStep,
    MeasuredSpeed,
    MemoryLoad,
    QueueLoad,
    ResidentAdapter,
    Route,
    SamplingParams,
)
from loraserve.monitor.demand import DemandWindow

MIB = 1 << 20
IDLE: dict[str, Any] = {
    "incarnation": "i1",
    "state": "READY",
    "kv_blocks_free": 1000,
    "pool_free_bytes": 64 * MIB,
    "pool_room_bytes": 64 * MIB,
    "decode_step_s": 0.02,
    "prefill_tokens_per_s": 1000.0,
    "load_bytes": 64.0 * MIB,
    "load_bytes_per_s": 100.0 * MIB,
}
CAPABILITIES: dict[str, Any] = {
    "incarnation": "i1",
    "kv_blocks": 1000,
    "block_tokens": 16,
    "pool_bytes": 64 * MIB,
    "max_running": 64,
    "max_model_tokens": 4096,
    "max_step_tokens": 512,
}


def engine_load(engine: str = "engine-0", **changes: Any) -> EngineLoad:
    """Return the load of an idle engine. ``changes`` are fields of EngineLoad or of its parts."""
    values = {**IDLE, **changes}
    return EngineLoad(
        engine=engine,
        incarnation=values.pop("incarnation"),
        state=values.pop("state"),
        queue=_take(QueueLoad, values),
        memory=_take(MemoryLoad, values),
        adapters=_take(AdapterState, values),
        speed=measured_speed(**values),
    )


def measured_speed(
    decode_step_s: float = 0.0,
    prefill_tokens_per_s: float = 0.0,
    load_bytes: float = 0.0,
    load_bytes_per_s: float = 0.0,
    **changes: Any,
) -> MeasuredSpeed:
    """Return measured speeds. Arguments are fields of MeasuredSpeed, or rates of steps and loads without counts."""
    if decode_step_s:
        changes.setdefault("decode_step", MeanStep(duration_s=decode_step_s))
    if prefill_tokens_per_s:
        changes.setdefault("prefill_step", MeanStep(duration_s=1.0, prefill_tokens=prefill_tokens_per_s))
    if load_bytes or load_bytes_per_s:
        changes.setdefault("load", MeanLoad(slab_bytes=load_bytes, bytes_per_s=load_bytes_per_s))
    return MeasuredSpeed(**changes)


def engine_capabilities(engine: str = "engine-0", **changes: Any) -> EngineCapabilities:
    return EngineCapabilities(engine=engine, **{**CAPABILITIES, **changes})


def engine_seen(engine: str = "engine-0", age_s: float = 0.0, alive: bool = True, **changes: Any) -> EngineSeen:
    """Return an idle engine as the monitor publishes it; changes are fields of its load or its capabilities."""
    incarnation = {name: changes[name] for name in ("incarnation",) if name in changes}
    capabilities = {name: changes.pop(name) for name in EngineCapabilities.__struct_fields__ if name in changes}
    return EngineSeen(
        load=engine_load(engine, **incarnation, **changes),
        capabilities=engine_capabilities(engine, **capabilities),
        age_s=age_s,
        alive=alive,
    )


def engine_statistics(
    engine: str = "engine-0",
    incarnation: str = "i1",
    adapter_tokens: Iterable[AdapterTokens] = (),
    **counters: Any,
) -> EngineStatistics:
    """Return an engine's statistics; ``counters`` are fields of EngineCounters."""
    return EngineStatistics(
        engine=engine,
        incarnation=incarnation,
        counters=EngineCounters(**counters),
        adapter_tokens=tuple(adapter_tokens),
    )


def _take(kind: type[Any], values: dict[str, Any]) -> Any:
    return kind(**{name: values.pop(name) for name in kind.__struct_fields__ if name in values})


def adapter_ref(number: int = 0, slab_bytes: int = MIB, rank: int = 8) -> AdapterRef:
    return AdapterRef(name=f"adapter-{number}", version=f"v{number}", rank=rank, slab_bytes=slab_bytes)


def resident(adapter: AdapterRef, pinned: bool = False, running: int = 0) -> ResidentAdapter:
    """Return the adapter as it appears in the report of an engine that holds it."""
    return ResidentAdapter(
        name=adapter.name,
        version=adapter.version,
        rank=adapter.rank,
        slab_bytes=adapter.slab_bytes,
        pinned=pinned,
        running=running,
    )


def asked_for(
    adapter: AdapterRef, decode_tokens_per_s: float, prefill_tokens_per_s: float = 0.0, forecast: float | None = None
) -> AdapterDemand:
    """Return the demand for an adapter. Without ``forecast`` the present rate is the forecast."""
    seen = decode_tokens_per_s + prefill_tokens_per_s
    return AdapterDemand(
        version=adapter.version,
        name=adapter.name,
        rank=adapter.rank,
        prefill_tokens_per_s=prefill_tokens_per_s,
        decode_tokens_per_s=decode_tokens_per_s,
        requests_per_s=decode_tokens_per_s / 50,
        forecast_tokens_per_s=seen if forecast is None else forecast,
    )


class DemandRates(NamedTuple):
    """Prefill tokens, decode tokens and requests per second over the window."""

    prefill_tokens: float = 0.0
    decode_tokens: float = 0.0
    requests: float = 0.0


def demand_rates(window: DemandWindow, now: float) -> dict[str, DemandRates]:
    """Return the rates of the versions that have demand in the window."""
    rates = {
        d.version: DemandRates(d.prefill_tokens_per_s, d.decode_tokens_per_s, d.requests_per_s)
        for d in window.demand(now, {})
    }
    return {version: rate for version, rate in rates.items() if any(rate)}


def picture(
    *engines: EngineSeen,
    sequence: int = 1,
    incarnation: str = "m1",
    age_s: float = 0.0,
    dead: Iterable[str] = (),
    demand: Iterable[AdapterDemand] = (),
) -> ClusterLoad:
    """Return the monitor's publication about engines that all reported ``age_s`` ago."""
    seen = tuple(msgspec.structs.replace(each, age_s=age_s, alive=each.engine not in dead) for each in engines)
    return ClusterLoad(incarnation=incarnation, sequence=sequence, engines=seen, demand=tuple(demand))


def route_request(request_id: str = "r1", tokens: int = 10, adapter: AdapterRef | None = None) -> Route:
    return Route(
        request_id=request_id,
        gateway="gateway-0",
        prompt_tokens=tuple(range(1, tokens + 1)),
        sampling=SamplingParams(max_tokens=16),
        adapter=adapter,
    )
