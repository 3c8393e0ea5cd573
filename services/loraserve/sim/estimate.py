"""Roughly what a cluster can serve: where searches begin. Pure."""

from loraserve.cost import StepShape
from loraserve.cost.profile import Profile
from loraserve.sim.workload import Workload


def capacity_rps(workload: Workload, profile: Profile, engines: int) -> float:
    """Requests a second at which engines with full batches would be busy all the time, if every batch were of one
    rank and all engines had the same work."""
    cost, batch = profile.cost, profile.engine.max_running / 2
    seconds = 0.0
    for request in workload.requests:
        adapter = workload.adapters[request.adapter]
        prompt, output = request.prompt_tokens, request.output_tokens
        prefill = StepShape(
            prefill_tokens=prompt,
            prefill_kv_tokens=prompt * prompt / 2,
            rank_tokens=prompt * adapter.rank,
            max_rank=adapter.rank,
        )
        decode = StepShape(
            decode_sequences=1,
            kv_tokens=prompt + output / 2,
            slab_bytes=adapter.slab_bytes / 2,
            rank_tokens=adapter.rank,
            max_rank=adapter.rank,
        )
        seconds += cost.step_s(prefill) - cost.step_base_s
        seconds += output * (cost.step_s(decode) - cost.step_base_s + cost.step_base_s / batch)
    return engines * len(workload.requests) / seconds if seconds else 1.0
