"""What decisions are fed in tests: an idle engine's report, adapters, demand, pictures, requests."""

from collections.abc import Iterable
from typing import Any

from loraserve.messages import (
    AdapterDemand,
    AdapterRef,
    ClusterLoad,
    EngineLoad,
    EngineSeen,
    ResidentAdapter,
    Route,
    SamplingParams,
)

MIB = 1 << 20
IDLE: dict[str, Any] = {
    "incarnation": "i1",
    "state": "READY",
    "waiting": 0,
    "running": 0,
    "waiting_prefill_tokens": 0,
    "kv_blocks_total": 1000,
    "kv_blocks_free": 1000,
    "block_tokens": 16,
    "pool_total_bytes": 64 * MIB,
    "pool_free_bytes": 64 * MIB,
    "pool_room_bytes": 64 * MIB,
    "max_running": 64,
    "max_model_tokens": 4096,
    "max_step_tokens": 512,
    "decode_step_s": 0.02,
    "prefill_tokens_per_s": 1000.0,
    "load_bytes_per_s": 100.0 * MIB,
    "load_bytes": 64.0 * MIB,
}


def engine_load(engine: str = "engine-0", **changes: Any) -> EngineLoad:
    """An idle engine's report, with changes."""
    return EngineLoad(engine=engine, **{**IDLE, **changes})


def adapter_ref(number: int = 0, slab_bytes: int = MIB, rank: int = 8) -> AdapterRef:
    return AdapterRef(name=f"adapter-{number}", version=f"v{number}", rank=rank, slab_bytes=slab_bytes)


def resident(adapter: AdapterRef, pinned: bool = False, running: int = 0) -> ResidentAdapter:
    """The adapter as an engine reports it that holds it."""
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
    """Demand for an adapter; without a forecast, what was seen goes on."""
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


def picture(
    *loads: EngineLoad,
    sequence: int = 1,
    incarnation: str = "m1",
    age_s: float = 0.0,
    dead: Iterable[str] = (),
    demand: Iterable[AdapterDemand] = (),
) -> ClusterLoad:
    """The monitor's picture of engines that all reported ``age_s`` ago."""
    seen = tuple(EngineSeen(load=load, age_s=age_s, alive=load.engine not in dead) for load in loads)
    return ClusterLoad(incarnation=incarnation, sequence=sequence, engines=seen, demand=tuple(demand))


def route_request(request_id: str = "r1", tokens: int = 10, adapter: AdapterRef | None = None) -> Route:
    return Route(
        request_id=request_id,
        gateway="gateway-0",
        prompt_tokens=tuple(range(1, tokens + 1)),
        sampling=SamplingParams(max_tokens=16),
        adapter=adapter,
    )
