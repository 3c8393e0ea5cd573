"""Defines the scheduler's interface: step batches (shared with the runner), events, instructions and limits."""

import msgspec

from loraserve.engine.adapters.lifecycle import LoadedSlab
from loraserve.errors import ConfigError
from loraserve.messages import AdapterRef, Admit, TokenDelta
from loraserve.messages.sampling import SamplingParams

# --- Step batches and their results, exchanged with the runner.

PENDING_TOKEN = -1
"""Placeholder in ``SequenceStep.tokens`` for a token that the preceding step, still in flight, will sample.

If present, it is the only element of ``tokens``, because a decode computes one token per sequence and step.
"""


class SequenceStep(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One sequence in a step: the runner computes the KV of ``tokens`` and writes it to ``blocks``.

    ``start`` is the position of the first of ``tokens``. All earlier positions have KV. ``blocks`` is the block table
    for ``start + len(tokens)`` positions. ``slot`` is the adapter slot, -1 for the base model. If ``sample`` is true,
    the runner samples the token after ``tokens``. Its index in the output is ``output_index``. ``history`` is the
    prompt (``prompt_length`` tokens) and the output so far. Only sampling penalties read ``history``. It does not
    change during a step with penalties, because this step is sent only after the previous result.
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
    """The sequences of one step. Each sequence occurs at most once."""

    step_id: int
    sequences: tuple[SequenceStep, ...]


class Sampled(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A sampled token.

    ``logprob`` is the token's log-probability. ``top`` lists the most likely tokens as (token, log-probability), best
    first. Both are set only if the request asks for log-probabilities.
    """

    request_id: str
    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class StepResult(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The tokens that a step sampled, in the order of its sequences.

    ``duration_s`` is the time of this step in seconds, without its wait for earlier steps. ``late`` lists the requests
    for which a layer was computed before the adapter's weights had been read. Their results are invalid.
    """

    step_id: int
    sampled: tuple[Sampled, ...]
    duration_s: float
    late: tuple[str, ...] = ()


# --- Events, which the scheduler receives.

CANCELLED = "cancelled"
"""The code of AdapterLoadFailed after CancelLoad. The adapter itself may be intact."""


class RequestArrived(msgspec.Struct, frozen=True):
    admit: Admit


class RequestAborted(msgspec.Struct, frozen=True):
    request_id: str


class HandOver(msgspec.Struct, frozen=True):
    """This engine stops. Its requests are rejected with code ``draining``, so that their gateways migrate them."""


class StepDone(msgspec.Struct, frozen=True):
    result: StepResult


class StepFailed(msgspec.Struct, frozen=True):
    """The runner could not compute the step. Any KV that the step wrote is invalid."""

    step_id: int
    message: str


class AdapterArriving(msgspec.Struct, frozen=True):
    """A part of the adapter's slab has been read, and the runner knows the slab's layout.

    ``read`` is the number of the read. Each retry has a new number. A step of at least ``least_tokens`` prefill tokens
    should last until the slab is verified. ``least_tokens`` is None if no request should start early with this read.
    """

    version: str
    read: int
    least_tokens: int | None


class AdapterLoaded(msgspec.Struct, frozen=True):
    """A slab is in the pool, verified and installed in its slot.

    ``read`` is the number of the read, or 0 if no AdapterArriving announced the read. In a simulation ``slab`` is None.
    """

    version: str
    read: int = 0
    slab: LoadedSlab | None = None


class AdapterLoadFailed(msgspec.Struct, frozen=True):
    version: str
    code: str
    message: str


class AdapterDamaged(msgspec.Struct, frozen=True):
    """The slab of a resident adapter was overwritten in the pool. Results computed with the adapter may be wrong."""

    version: str


class CopiesRequested(msgspec.Struct, frozen=True):
    epoch: int
    adapters: tuple[AdapterRef, ...]


class CopiesRetired(msgspec.Struct, frozen=True):
    """The planner no longer wants the copies of plans up to ``epoch``, except the versions in ``keep``."""

    epoch: int
    keep: tuple[str, ...]


class AdapterExpected(msgspec.Struct, frozen=True):
    adapter: AdapterRef


class LeasesEnded(msgspec.Struct, frozen=True):
    """Peers' leases on slabs of this engine have ended. The slabs may now be evicted."""


Event = (
    RequestArrived
    | RequestAborted
    | HandOver
    | StepDone
    | StepFailed
    | AdapterArriving
    | AdapterLoaded
    | AdapterLoadFailed
    | AdapterDamaged
    | CopiesRequested
    | CopiesRetired
    | AdapterExpected
    | LeasesEnded
)

# --- Instructions, which the scheduler returns.


class RunStep(msgspec.Struct, frozen=True):
    """Compute the batch after all earlier batches. Report StepDone or StepFailed in the same order."""

    batch: StepBatch


class LoadAdapter(msgspec.Struct, frozen=True):
    """Read the slab to ``offset_bytes`` of the pool, install it in ``slot`` and report how the load ended."""

    adapter: AdapterRef
    slot: int
    offset_bytes: int


class CancelLoad(msgspec.Struct, frozen=True):
    """Stop this load, because no request, plan or prefetch needs the adapter any more.

    Report AdapterLoadFailed with CANCELLED once nothing writes to the extent. If the load ends before it is stopped,
    report its result instead. The extent stays reserved until the report.
    """

    version: str


class LeftSlab(msgspec.Struct, frozen=True):
    """A verified slab in an extent that was freed. It stays readable until the next load writes to the extent."""

    adapter: AdapterRef
    offset_bytes: int
    slab: LoadedSlab | None = None


class EvictAdapter(msgspec.Struct, frozen=True):
    """Remove the adapter from its slot. A later LoadAdapter may reuse the slot and the extent.

    ``reason`` is for logs. ``left`` is None if the slab was incomplete or damaged.
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
    """Tell the gateway that the request failed. The request produces no more tokens."""

    request_id: str
    gateway: str
    code: str
    message: str


class PlanReady(msgspec.Struct, frozen=True):
    """Tell the planner that the epoch's adapters are resident and pinned, except ``failed`` (version -> reason)."""

    epoch: int
    failed: dict[str, str]


Instruction = RunStep | LoadAdapter | CancelLoad | EvictAdapter | Emit | Reject | PlanReady

# --- Limits.


class SchedulerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits set by the model, the memory and the configuration.

    ``max_step_tokens`` is the maximum sum of prefill and decode tokens in a step. ``steps_ahead`` is the number of
    further steps that may be sent while one runs.
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
