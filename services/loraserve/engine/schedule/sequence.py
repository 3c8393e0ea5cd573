"""One request in the scheduler: its states, its tokens and its KV blocks.

The states and the transitions between them:

    WAITING --START--> RUNNING          its adapter is resident and its blocks are allocated
    WAITING --START_EARLY--> EARLY      its blocks are allocated, its adapter is still being read
    EARLY --CONFIRM--> RUNNING          the adapter arrived in time for the step
    EARLY --SET_BACK--> WAITING         the adapter was late or was read again: the step is discarded
    RUNNING --SET_BACK--> WAITING       preempted: an earlier request needs its blocks
    WAITING --RELEASE--> FINISHED       aborted or rejected
    RUNNING --RELEASE--> FINISHED       finished, aborted or rejected while in no step
    EARLY --RELEASE--> FINISHED         its step failed
    RUNNING --END--> ENDING             ended while steps in flight still write to its blocks
    EARLY --END--> ENDING               ended while its step still writes to its blocks
    ENDING --RELEASE--> FINISHED        the last of these steps is done

Requests in RUNNING, EARLY and ENDING hold KV blocks and a pin on their adapter. Requests in WAITING hold neither.
"""

from enum import Enum

from loraserve.engine.schedule.blocks import chain_digest, root_digest
from loraserve.engine.schedule.events import PENDING_TOKEN, Sampled, SequenceStep
from loraserve.messages import Admit, TokenDelta
from loraserve.messages.stop import STOP, finish_of


class SequenceState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    EARLY = "early"
    ENDING = "ending"
    FINISHED = "finished"


class Transition(Enum):
    START = "start"
    START_EARLY = "start_early"
    CONFIRM = "confirm"
    SET_BACK = "set_back"
    END = "end"
    RELEASE = "release"


# Module constants, because they are compared once per token and `Enum.MEMBER` is a slow lookup in Python 3.11.
WAITING, RUNNING, EARLY, ENDING, FINISHED = SequenceState

TRANSITIONS = {
    (WAITING, Transition.START): RUNNING,
    (WAITING, Transition.START_EARLY): EARLY,
    (WAITING, Transition.RELEASE): FINISHED,
    (EARLY, Transition.CONFIRM): RUNNING,
    (EARLY, Transition.SET_BACK): WAITING,
    (EARLY, Transition.END): ENDING,
    (EARLY, Transition.RELEASE): FINISHED,
    (RUNNING, Transition.SET_BACK): WAITING,
    (RUNNING, Transition.END): ENDING,
    (RUNNING, Transition.RELEASE): FINISHED,
    (ENDING, Transition.RELEASE): FINISHED,
}


class Sequence:
    """The tokens of a request and the progress of their computation.

    ``history`` holds the known tokens: the prompt and the output so far. The first ``computed`` tokens have KV.
    ``in_flight`` is the number of steps in flight that contain the sequence. When they are done, ``scheduled`` tokens
    will have KV, and ``pending`` more tokens will be known.
    """

    def __init__(self, admit: Admit, order: int, max_model_tokens: int, block_tokens: int) -> None:
        self.admit = admit
        self.order = order
        self.request_id = admit.request_id
        self.version = admit.adapter.version if admit.adapter else ""
        self.prompt_length = len(admit.prompt_tokens) - admit.generated
        self.history = list(admit.prompt_tokens)
        self.max_tokens = min(admit.sampling.max_tokens, max_model_tokens - self.prompt_length)
        self.state = WAITING
        self.slot = -1
        self.blocks: tuple[int, ...] = ()
        self.computed = 0
        self.scheduled = 0
        self.pending = 0
        self.in_flight = 0
        self.cached_tokens = 0
        self.overtaken = 0
        """Number of later requests with adapters that started while this request waited for its adapter."""
        self.early_read = 0
        """Number of the adapter read that the early start used. Reset to 0 when that step is done."""
        self._block_tokens = block_tokens
        self._digests: list[bytes] = []

    def advance(self, transition: Transition) -> None:
        """Apply a transition. Raises AssertionError if the current state does not allow it."""
        state = TRANSITIONS.get((self.state, transition))
        assert state is not None, f"{self.request_id}: {transition.name} in state {self.state.name}"
        self.state = state

    @property
    def output_length(self) -> int:
        return len(self.history) - self.prompt_length

    @property
    def has_started(self) -> bool:
        """Whether results computed with the adapter are in use: the request runs, or waits and has output."""
        if self.state is WAITING:
            return self.output_length > self.admit.generated
        return self.state is RUNNING or self.state is EARLY

    @property
    def uncomputed(self) -> int:
        """Number of known tokens without KV. It is 1 while the request decodes."""
        return len(self.history) - self.computed

    @property
    def is_decoding(self) -> bool:
        """Whether the whole prompt has KV and only the last known token has none."""
        return self.prompt_length <= self.computed == len(self.history) - 1

    @property
    def unscheduled(self) -> int:
        """Number of known and pending tokens that have no KV and are in no step in flight."""
        return len(self.history) + self.pending - self.scheduled

    @property
    def will_decode(self) -> bool:
        """Whether the request will be decoding when the steps in flight are done."""
        return self.prompt_length <= self.scheduled == len(self.history) + self.pending - 1

    @property
    def can_run_ahead(self) -> bool:
        """Whether the next step may include the sequence before the result of its last step is known."""
        if not self.pending:
            return True
        next_index = self.output_length + self.pending
        return next_index < self.max_tokens and not self.admit.sampling.changes_logits(next_index)

    def block_digest(self, index: int) -> bytes:
        """Return the prefix cache digest of block ``index``. All tokens of the block must be known."""
        while len(self._digests) <= index:
            start = len(self._digests) * self._block_tokens
            previous = self._digests[-1] if self._digests else root_digest(self.version)
            self._digests.append(chain_digest(previous, self.history[start : start + self._block_tokens]))
        return self._digests[index]

    def next_part(self, tokens: int) -> SequenceStep:
        total = len(self.history) + self.pending
        return SequenceStep(
            request_id=self.request_id,
            tokens=tuple(self.history[self.scheduled : self.scheduled + tokens]) or (PENDING_TOKEN,),
            start=self.scheduled,
            blocks=self.blocks,
            sampling=self.admit.sampling,
            prompt_length=self.prompt_length,
            slot=self.slot,
            sample=self.scheduled + tokens == total,
            output_index=total - self.prompt_length,
            history=self.history,
        )

    def reset(self, computed: int) -> None:
        """Set the number of tokens with KV. No step in flight may contain the sequence."""
        self.computed = self.scheduled = computed

    def part_sent(self, part: SequenceStep) -> None:
        self.in_flight += 1
        self.scheduled += len(part.tokens)
        self.pending += part.sample

    def part_returned(self, part: SequenceStep) -> None:
        self.in_flight -= 1
        self.pending -= part.sample

    def is_kv_valid(self, part: SequenceStep) -> bool:
        """Return whether the KV that a completed step wrote for this sequence is valid.

        It is invalid if an earlier step failed, or if the step computed a token that was not added to ``history``.
        """
        return part.start == self.computed and part.start + len(part.tokens) <= len(self.history)

    def accept(self, sampled: Sampled, eos: frozenset[int]) -> TokenDelta:
        """Append the sampled token to ``history`` unless it stops the request. Return the message for the gateway."""
        index, token, sampling = self.output_length, sampled.token, self.admit.sampling
        finish, stop_reason = finish_of(token, index, sampling, self.max_tokens, eos)
        # A token that stops the request is not added to the history, so that no step computes its KV.
        if finish != STOP:
            self.history.append(token)
        return TokenDelta(
            request_id=self.request_id,
            index=index,
            tokens=(token,),
            finish=finish,
            cached_tokens=self.cached_tokens if index == 0 else 0,
            logprobs=((sampled.logprob, sampled.top),) if sampling.logprobs is not None else (),
            stop_reason=stop_reason,
        )
