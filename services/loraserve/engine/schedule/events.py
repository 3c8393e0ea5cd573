"""What one step computes and what it brings: the values that pass between the scheduler and the model runner.

Plain data, so that the scheduler stays pure.
"""

import msgspec

from loraserve.messages import AdapterRef, Admit, TokenDelta
from loraserve.messages.sampling import SamplingParams

DRAWN = -1
"""In ``SequenceStep.tokens``: the token that the step sent just before draws for this sequence.

Nobody has seen it when the step is sent. It stands alone, as a sequence decodes one token a step.
"""


class SequenceStep(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One sequence's part of a step: the KV of ``tokens`` is computed and written, maybe a next token is drawn.

    ``slot`` is the adapter's, -1 the base model. ``start`` tokens have their KV already, so it is the position of the
    first of ``tokens``. ``blocks`` is the block table and covers ``start + len(tokens)`` positions. ``sample`` is set
    where ``tokens`` ends with the last token there is; the drawn one gets output index ``output_index``. ``history`` is
    prompt and output so far, read only where penalties need it: then it is whole and does not change before the step
    is done, since no step with penalties contains DRAWN. ``prompt_length`` says where the output begins.
    """

    request_id: str
    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    sampling: SamplingParams
    prompt_length: int
    slot: int = -1
    sample: bool = True
    output_index: int = 0
    history: list[int] = msgspec.field(default_factory=list)


class StepBatch(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """All sequences of one step, each at most once."""

    step_id: int
    sequences: tuple[SequenceStep, ...]

    @property
    def prefill_tokens(self) -> int:
        """Those of sequences that do not decode; a preempted request's output is among them."""
        return sum(len(s.tokens) for s in self.sequences if s.output_index == 0 or len(s.tokens) > 1)


class Sampled(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A drawn token. ``logprob`` and ``top`` ((token, log-probability), best first) are filled where asked for."""

    request_id: str
    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class StepResult(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a step brought, in the order of its sequences.

    ``duration_s`` is the time it took the model, without that of steps before it which it had to wait for. ``late`` are
    requests whose adapters arrived too late for some layer: what was computed and drawn for them means nothing.
    """

    step_id: int
    sampled: tuple[Sampled, ...]
    duration_s: float
    late: tuple[str, ...] = ()


# MERGED: loraserve.engine.schedule.events
# """What the scheduler is told, and what it tells the engine to do. Plain data, no behaviour."""


CANCELLED = "cancelled"
"""The code of a load that ended because nobody wanted it: no failure of its adapter."""


class RequestArrived(msgspec.Struct, frozen=True):
    admit: Admit


class RequestAborted(msgspec.Struct, frozen=True):
    request_id: str


class StepDone(msgspec.Struct, frozen=True):
    result: StepResult


class StepFailed(msgspec.Struct, frozen=True):
    """The model could not compute the step; what it wrote to the KV cache is not to be trusted."""

    step_id: int
    message: str


class AdapterArriving(msgspec.Struct, frozen=True):
    """Some of an adapter that loads is there, by the read of this number, and the runner knows its layout.

    A step of at least ``least_tokens`` prefill tokens is expected to last until all of it is verified; None: no step
    is, or it is not worth it. Read numbers are never used again, and a read that fails is followed by another number.
    """

    version: str
    read: int
    least_tokens: int | None


class AdapterLoaded(msgspec.Struct, frozen=True):
    """``read`` is the one that was verified, 0 where nobody was told that it arrives."""

    version: str
    read: int = 0


class AdapterLoadFailed(msgspec.Struct, frozen=True):
    version: str
    code: str
    message: str


class AdapterDamaged(msgspec.Struct, frozen=True):
    """What lies in the extent of a resident adapter is not its slab any more: nothing computed with it is right."""

    version: str


class PlanPrepared(msgspec.Struct, frozen=True):
    """The planner wants these copies here."""

    epoch: int
    adapters: tuple[AdapterRef, ...]


class CopiesRetired(msgspec.Struct, frozen=True):
    """The planner no longer wants any copy of plans up to ``epoch`` but ``keep`` (versions)."""

    epoch: int
    keep: tuple[str, ...]


class AdapterExpected(msgspec.Struct, frozen=True):
    """A request for it is about to come, as far as the router can tell."""

    adapter: AdapterRef


class LeasesEnded(msgspec.Struct, frozen=True):
    """Peers do not read any more what they had leases on: there may be room."""


Event = (
    RequestArrived
    | RequestAborted
    | StepDone
    | StepFailed
    | AdapterArriving
    | AdapterLoaded
    | AdapterLoadFailed
    | AdapterDamaged
    | PlanPrepared
    | CopiesRetired
    | AdapterExpected
    | LeasesEnded
)


class RunStep(msgspec.Struct, frozen=True):
    """Compute this batch after those before it, and come back with StepDone or StepFailed, in the same order."""

    batch: StepBatch


class LoadAdapter(msgspec.Struct, frozen=True):
    """Fill the extent at ``offset_bytes`` of the pool, make it the adapter of ``slot``, report AdapterLoaded."""

    adapter: AdapterRef
    slot: int
    offset_bytes: int


class CancelLoad(msgspec.Struct, frozen=True):
    """Nobody wants it any more: end it soon. Report AdapterLoadFailed with CANCELLED once nothing writes to its extent,
    or however it ended before; its extent stays its own until then."""

    version: str


class LeftSlab(msgspec.Struct, frozen=True):
    """A verified slab that lies in an extent which is nobody's, until that is filled anew."""

    adapter: AdapterRef
    offset_bytes: int


class EvictAdapter(msgspec.Struct, frozen=True):
    """The slot and its extent belong to nobody any more. ``left`` is None where the adapter never was all there, or
    was damaged there."""

    version: str
    slot: int
    left: LeftSlab | None = None


class Emit(msgspec.Struct, frozen=True):
    gateway: str
    delta: TokenDelta


class Reject(msgspec.Struct, frozen=True):
    """The request ended without finishing; it holds nothing any more."""

    request_id: str
    gateway: str
    code: str
    message: str


class PlanReady(msgspec.Struct, frozen=True):
    """Every copy of the epoch is resident and pinned, or is in ``failed`` (version -> reason)."""

    epoch: int
    failed: dict[str, str]


Instruction = RunStep | LoadAdapter | CancelLoad | EvictAdapter | Emit | Reject | PlanReady


# MERGED: loraserve.engine.schedule.events
# """What the scheduler has to work with: facts of the model and choices of the configuration."""


class SchedulerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """``max_step_tokens`` bounds one step's prefill and decode tokens together.

    ``steps_ahead`` more steps than one may be outstanding: as many as the runner takes before it has ended the first.
    """

    kv_blocks: int
    block_tokens: int
    pool_bytes: int
    max_adapters: int
    max_rank: int = 256
    max_running: int
    max_waiting: int
    max_step_tokens: int
    max_model_tokens: int
    eos_token_ids: frozenset[int]
    prefix_cache: bool = True
    max_loads: int = 2
    steps_ahead: int = 0

    def __post_init__(self) -> None:
        if self.max_step_tokens < self.max_running:
            raise ValueError(
                f"engine.max_step_tokens is {self.max_step_tokens}, it must be at least engine.max_running "
                f"({self.max_running}), or some requests would never decode"
            )
