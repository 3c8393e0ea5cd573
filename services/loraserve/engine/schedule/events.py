"""The scheduler's interface as plain data: step batches (shared with the runner), events, instructions, limits."""

import msgspec

from loraserve.engine.adapters.lifecycle import LoadedSlab
from loraserve.errors import ConfigError
from loraserve.messages import AdapterRef, Admit, TokenDelta
from loraserve.messages.sampling import SamplingParams

# --- Step batches: what a runner computes, and what it returns.

PENDING_TOKEN = -1
"""Stands in ``SequenceStep.tokens`` for the token that the step sent just before samples for this sequence.

That token is not known yet when the step is sent. It is the part's only token, as a sequence decodes one per step.
"""


class SequenceStep(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One sequence's part of a step: compute the KV of ``tokens`` and write it to ``blocks``.

    ``start`` tokens have KV already, so it is also the position of the first of ``tokens``. ``blocks`` is the block
    table and covers ``start + len(tokens)`` positions. ``slot`` is the adapter's, -1 for the base model. If ``sample``
    is set, ``tokens`` ends with the sequence's last token, and the next token is sampled as output ``output_index``.
    ``history`` is the prompt and the output so far; the output begins at ``prompt_length``. Only penalties read it. It
    is complete and does not change before the step is done, as a step with penalties contains no PENDING_TOKEN.
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
    """All sequences of one step. Each sequence occurs at most once."""

    step_id: int
    sequences: tuple[SequenceStep, ...]


class Sampled(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A sampled token.

    ``logprob`` and ``top``, pairs of (token, log-probability) with the best first, are filled if the request asks for
    them.
    """

    request_id: str
    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class StepResult(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The tokens that a step sampled, in the order of its sequences.

    ``duration_s`` is the model's time for this step, without the time of earlier steps that it waited for. ``late`` are
    requests whose adapter had not been read far enough for some layer: their part of the step is meaningless.
    """

    step_id: int
    sampled: tuple[Sampled, ...]
    duration_s: float
    late: tuple[str, ...] = ()


# --- Events: what happened.

CANCELLED = "cancelled"
"""The code of a load that was cancelled. It says nothing about the adapter."""


class RequestArrived(msgspec.Struct, frozen=True):
    admit: Admit


class RequestAborted(msgspec.Struct, frozen=True):
    request_id: str


class StepDone(msgspec.Struct, frozen=True):
    result: StepResult


class StepFailed(msgspec.Struct, frozen=True):
    """The runner could not compute the step. The KV that it may have written is invalid."""

    step_id: int
    message: str


class AdapterArriving(msgspec.Struct, frozen=True):
    """Part of an adapter has been read, and the runner knows its layout.

    ``read`` is the number of the read; numbers are never reused, and a retry has a new one. A step of at least
    ``least_tokens`` prefill tokens is expected to last until the slab is verified. None: no step is, or an early start
    does not pay.
    """

    version: str
    read: int
    least_tokens: int | None


class AdapterLoaded(msgspec.Struct, frozen=True):
    """A slab is in the pool, verified and installed in its slot.

    ``read`` is its read's number, 0 if no AdapterArriving announced it. A simulated engine has no ``slab``.
    """

    version: str
    read: int = 0
    slab: LoadedSlab | None = None


class AdapterLoadFailed(msgspec.Struct, frozen=True):
    version: str
    code: str
    message: str


class AdapterDamaged(msgspec.Struct, frozen=True):
    """The extent of a resident adapter no longer holds its slab. Everything computed with it may be wrong."""

    version: str


class PlanPrepared(msgspec.Struct, frozen=True):
    epoch: int
    adapters: tuple[AdapterRef, ...]


class CopiesRetired(msgspec.Struct, frozen=True):
    """The planner no longer wants the copies of plans up to ``epoch``, except the versions in ``keep``."""

    epoch: int
    keep: tuple[str, ...]


class AdapterExpected(msgspec.Struct, frozen=True):
    adapter: AdapterRef


class LeasesEnded(msgspec.Struct, frozen=True):
    """Peers have finished reading from this engine's pool, which may make room there."""


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

# --- Instructions: what to do about it.


class RunStep(msgspec.Struct, frozen=True):
    """Compute this batch after those before it. Report StepDone or StepFailed, in the order of the instructions."""

    batch: StepBatch


class LoadAdapter(msgspec.Struct, frozen=True):
    """Read the slab into the pool at ``offset_bytes``, install it in ``slot`` and report AdapterLoaded."""

    adapter: AdapterRef
    slot: int
    offset_bytes: int


class CancelLoad(msgspec.Struct, frozen=True):
    """Stop this load: no request and no plan needs the adapter any more.

    Report AdapterLoadFailed with CANCELLED once nothing writes to its extent, or the load's own result if it ended
    first. The extent stays reserved until then.
    """

    version: str


class LeftSlab(msgspec.Struct, frozen=True):
    """A verified slab in an extent that was freed. It stays readable until the extent is filled again."""

    adapter: AdapterRef
    offset_bytes: int
    slab: LoadedSlab | None = None


class EvictAdapter(msgspec.Struct, frozen=True):
    """The slot and the extent of this adapter are free; ``reason`` says why, for logs.

    ``left`` is None if the slab was incomplete or damaged.
    """

    version: str
    slot: int
    name: str
    reason: str
    left: LeftSlab | None = None


class Emit(msgspec.Struct, frozen=True):
    gateway: str
    delta: TokenDelta


class Reject(msgspec.Struct, frozen=True):
    """Tell the gateway that the request ended without finishing. The scheduler holds nothing for it any more."""

    request_id: str
    gateway: str
    code: str
    message: str


class PlanReady(msgspec.Struct, frozen=True):
    """Answer the planner: every copy of the epoch is resident and pinned, or is in ``failed`` (version -> reason)."""

    epoch: int
    failed: dict[str, str]


Instruction = RunStep | LoadAdapter | CancelLoad | EvictAdapter | Emit | Reject | PlanReady

# --- Limits.


class SchedulerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler has to work with: facts of the model, and settings.

    ``max_step_tokens`` bounds the prefill and decode tokens of one step together. ``steps_ahead`` is the number of
    steps that the runner accepts before the oldest one is done.
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
        check_step_tokens(self.max_step_tokens, self.max_running)


def check_step_tokens(max_step_tokens: int, max_running: int) -> None:
    """Raise ConfigError if a step has too few tokens for all running requests to decode."""
    if max_step_tokens < max_running:
        raise ConfigError(
            f"engine.max_step_tokens is {max_step_tokens}, it must be at least engine.max_running ({max_running}), or "
            "some requests would never decode"
        )
