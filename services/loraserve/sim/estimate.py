"""Estimates of a cluster's capacity: where a search for the largest load begins, and a limit that no policy exceeds."""

from loraserve.cost import StepShape
from loraserve.cost.profile import Profile
from loraserve.messages import AdapterRef
from loraserve.sim.workload import SimRequest, Workload


def capacity_rps(workload: Workload, profile: Profile, engines: int) -> float:
    """Return a rough estimate of the requests per second that a cluster serves.

    It assumes that all engines have the same work and always compute half-full batches of a single rank.
    """
    seconds = _engine_seconds(workload, profile, profile.engine.max_running / 2, slab_reads=0.5)
    return engines * len(workload.requests) / seconds if seconds else 1.0


def limit_rps(workload: Workload, profile: Profile, engines: int) -> float:
    """Return requests per second that no placement and no routing can exceed permanently.

    Every engine computes all the time, its batches are as full as places and KV memory allow, no token pays for a rank
    above its own, and slabs are read for nothing. What a short run serves beyond this still waits or decodes when
    arrivals end.
    """
    seconds = _engine_seconds(workload, profile, _fullest_batch(workload, profile), slab_reads=0.0)
    return engines * len(workload.requests) / seconds if seconds else float("inf")


def _engine_seconds(workload: Workload, profile: Profile, batch: float, slab_reads: float) -> float:
    """Return the engine time of all requests; ``slab_reads`` are reads of its slab for each decoded token."""
    return sum(_request_s(r, workload.adapters[r.adapter], profile, batch, slab_reads) for r in workload.requests)


def _request_s(request: SimRequest, adapter: AdapterRef, profile: Profile, batch: float, slab_reads: float) -> float:
    cost, prompt, output = profile.cost, request.prompt_tokens, request.output_tokens
    prefill = StepShape(
        prefill_tokens=prompt,
        prefill_kv_tokens=prompt * prompt / 2,
        rank_tokens=prompt * adapter.rank,
        max_rank=adapter.rank,
    )
    decode = StepShape(
        decode_sequences=1,
        kv_tokens=prompt + output / 2,
        slab_bytes=adapter.slab_bytes * slab_reads,
        rank_tokens=adapter.rank,
        max_rank=adapter.rank,
    )
    token_s = cost.step_s(decode) - cost.step_base_s + cost.step_base_s / batch
    return cost.step_s(prefill) - cost.step_base_s + output * token_s


def _fullest_batch(workload: Workload, profile: Profile) -> float:
    """Return the mean number of decoding sequences while KV memory is always full."""
    engine = profile.engine
    tokens = sum(r.output_tokens for r in workload.requests)
    held = sum(r.output_tokens * (r.prompt_tokens + r.output_tokens / 2) for r in workload.requests)
    if not held:
        return engine.max_running
    return min(engine.max_running, engine.kv_blocks * engine.block_tokens * tokens / held)
