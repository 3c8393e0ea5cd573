"""Roughly what a cluster can serve, and what it cannot: where searches begin, and where they must end. Pure."""

from loraserve.cost import StepShape
from loraserve.cost.profile import Profile
from loraserve.messages import AdapterRef
from loraserve.sim.workload import SimRequest, Workload


def capacity_rps(workload: Workload, profile: Profile, engines: int) -> float:
    """Requests a second at which engines with half-full batches would be busy all the time, if every batch were of one
    rank and all engines had the same work."""
    seconds = _seconds(workload, profile, profile.engine.max_running / 2, reads=0.5)
    return engines * len(workload.requests) / seconds if seconds else 1.0


def limit_rps(workload: Workload, profile: Profile, engines: int) -> float:
    """Requests a second that no placement and no routing can serve more of for good.

    Each engine is busy all the time with batches as full as places and KV memory allow, no token pays for a larger rank
    than its own, slabs are read for nothing. What a run serves beyond it still waits, or still decodes, when arrivals
    end.
    """
    seconds = _seconds(workload, profile, _fullest_batch(workload, profile), reads=0.0)
    return engines * len(workload.requests) / seconds if seconds else float("inf")


def _seconds(workload: Workload, profile: Profile, batch: float, reads: float) -> float:
    """Engine time of all requests; ``reads``: of its slab, by each token that is decoded."""
    return sum(_request_s(r, workload.adapters[r.adapter], profile, batch, reads) for r in workload.requests)


def _request_s(request: SimRequest, adapter: AdapterRef, profile: Profile, batch: float, reads: float) -> float:
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
        slab_bytes=adapter.slab_bytes * reads,
        rank_tokens=adapter.rank,
        max_rank=adapter.rank,
    )
    token_s = cost.step_s(decode) - cost.step_base_s + cost.step_base_s / batch
    return cost.step_s(prefill) - cost.step_base_s + output * token_s


def _fullest_batch(workload: Workload, profile: Profile) -> float:
    """Sequences that decode at once, on average, where KV memory is never free."""
    engine = profile.engine
    tokens = sum(r.output_tokens for r in workload.requests)
    held = sum(r.output_tokens * (r.prompt_tokens + r.output_tokens / 2) for r in workload.requests)
    if not held:
        return engine.max_running
    return min(engine.max_running, engine.kv_blocks * engine.block_tokens * tokens / held)
