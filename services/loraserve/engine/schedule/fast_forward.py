"""Many decode steps at once, for a simulator: the scheduler ends in the very state that it reaches step by step. Pure.

While nothing but decoding goes on, a step differs from the one before it in positions only. Such quiet steps need no
decision, and at any scale they are most of all steps.
"""

from msgspec.structs import replace

from loraserve.engine.schedule.events import StepBatch
from loraserve.engine.schedule.scheduler import Scheduler
from loraserve.engine.schedule.sequence import RUNNING, Sequence


def quiet_steps(scheduler: Scheduler) -> int:
    """How many steps, from the outstanding one on, are sure to end nothing and to let nobody in.

    0 where the next step may differ, where a prefix cache makes blocks depend on content, and where steps overlap.
    The tokens drawn must stop no request.
    """
    running = scheduler.running
    batch = scheduler.outstanding.only
    if batch is None or scheduler.limits.prefix_cache or len(batch.sequences) != len(running):
        return 0
    # The latest arrivals may still prefill: they are looked at first.
    if _lets_in(scheduler) or not all(s.decoding and s.drawing and s.state is RUNNING for s in reversed(running)):
        return 0
    steps = min(s.max_tokens - s.output_length - 1 for s in running)
    free = scheduler.blocks.free
    while steps > 0 and sum(_blocks_missing(s, steps) for s in running) > free:
        steps //= 2
    return max(0, steps)


def skip(scheduler: Scheduler, steps: int, token: int) -> StepBatch:
    """As if ``steps`` of the quiet steps had come back, each with ``token`` for everybody; the step that is out then.

    ``steps`` is between 1 and ``quiet_steps``.
    """
    before = scheduler.outstanding.only
    assert before is not None, "steps overlap: there are no quiet ones"
    scheduler.outstanding.take(before.step_id)
    _grow(scheduler, steps)
    parts = []
    for sequence, part in zip(scheduler.running, before.sequences, strict=True):
        sequence.skip(steps, token)
        scheduler.counts.computed(sequence.version, steps, decode=True)
        start, output_index = part.start + steps, part.output_index + steps
        parts.append(replace(part, tokens=(token,), start=start, blocks=sequence.blocks, output_index=output_index))
    batch = StepBatch(step_id=before.step_id + steps, sequences=tuple(parts))
    scheduler.outstanding.send(batch)
    scheduler.steps += steps
    return batch


def _lets_in(scheduler: Scheduler) -> bool:
    """Whether the next step might begin a request; steps on which one gave its blocks back let nobody in."""
    limits = scheduler.limits
    if len(scheduler.running) >= min(limits.max_running, limits.max_step_tokens):
        return False
    free = scheduler.blocks.free
    return any(
        scheduler.residency.ready(s.version) and s.blocks_for(len(s.history) + 1) <= free for s in scheduler.waiting
    )


def _blocks_missing(sequence: Sequence, steps: int) -> int:
    return sequence.blocks_for(sequence.computed + steps + 1) - len(sequence.blocks)


def _grow(scheduler: Scheduler, steps: int) -> None:
    """Blocks in the order in which the steps would take them."""
    block_tokens = scheduler.limits.block_tokens
    due: list[tuple[int, int]] = []
    for place, sequence in enumerate(scheduler.running):
        held = len(sequence.blocks)
        more = range(held, held + _blocks_missing(sequence, steps))
        due += [(index * block_tokens - sequence.computed, place) for index in more]
    for _, place in sorted(due):
        block = scheduler.blocks.take()
        assert block is not None, "free blocks vanished"
        scheduler.running[place].blocks += (block,)
