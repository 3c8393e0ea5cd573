"""One request in the scheduler: its states, its tokens and its KV blocks.

The states and the transitions between them:

    WAITING --START--> RUNNING          its adapter is resident and its blocks are allocated
    WAITING --START_EARLY--> EARLY      the same, before its adapter has been read completely
    EARLY --CONFIRM--> RUNNING          the adapter arrived in time for the step
    EARLY --SET_BACK--> WAITING         the adapter came too late, or was read again: the step is discarded
    RUNNING --SET_BACK--> WAITING       preempted: an earlier request needs its blocks
    WAITING --RELEASE--> FINISHED       aborted or rejected
    RUNNING --RELEASE--> FINISHED       finished, aborted or rejected while in no step
    EARLY --RELEASE--> FINISHED         its step failed
    RUNNING --END--> ENDING             ended while steps in flight still write to its blocks
    EARLY --END--> ENDING               the same
    ENDING --RELEASE--> FINISHED        the last of those steps came back

Requests in WAITING hold neither KV blocks nor a pin on their adapter; those in RUNNING, EARLY and ENDING hold both.
"""

from enum import Enum

from loraserve.engine.schedule.blocks import chain_digest, root_digest
from loraserve.engine.schedule.events import PENDING_TOKEN, Sampled, SequenceStep
from loraserve.messages import Admit, TokenDelta
from loraserve.messages.stop import STOP, finish_of


class SequenceState(Enum):
    """Where a request is in its life; see the module's docstring."""

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


# Module constants, as they are compared with once per token: in Python 3.11 `Enum.MEMBER` is a slow look-up.
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
    """A request's tokens and how far they are computed.

    ``history`` holds the known tokens: the prompt and the output so far. The KV of the first ``computed`` of them
    exists. Once the ``in_flight`` steps that contain the sequence are done, ``scheduled`` tokens have their KV and
    ``pending`` more tokens are known.
    """

    def __init__(self, admit: Admit, order: int, max_model_tokens: int, block_tokens: int) -> None:
        self.admit = admit
        self.order = order
        self.request_id = admit.request_id
        self.version = admit.adapter.version if admit.adapter else ""
        self.prompt_length = len(admit.prompt_tokens)
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
        """Number of later requests with adapters that started while this one waited for its own."""
        self.early_read = 0
        """Number of the read of its adapter that it started with; 0 unless it started early and is in that step."""
        self._block_tokens = block_tokens
        self._digests: list[bytes] = []

    def advance(self, transition: Transition) -> None:
        """Change the state. Raises AssertionError if the state does not allow the transition."""
        state = TRANSITIONS.get((self.state, transition))
        assert state is not None, f"{self.request_id}: {transition.name} in state {self.state.name}"
        self.state = state

    @property
    def output_length(self) -> int:
        return len(self.history) - self.prompt_length

    @property
    def has_started(self) -> bool:
        """Whether anything computed for it is in use, or will be once it runs again."""
        if self.state is WAITING:
            return self.output_length > 0
        return self.state is RUNNING or self.state is EARLY

    @property
    def uncomputed(self) -> int:
        """Number of known tokens without KV; 1 while decoding."""
        return len(self.history) - self.computed

    @property
    def is_decoding(self) -> bool:
        """Whether only the last known token, an output token, has no KV."""
        return self.prompt_length <= self.computed == len(self.history) - 1

    @property
    def unscheduled(self) -> int:
        """Number of tokens, known or pending, that no step computes yet."""
        return len(self.history) + self.pending - self.scheduled

    @property
    def will_decode(self) -> bool:
        """Whether it is decoding once the steps in flight are done."""
        return self.prompt_length <= self.scheduled == len(self.history) + self.pending - 1

    @property
    def can_run_ahead(self) -> bool:
        """Whether its next step can be sent before the result of its last one is known."""
        if not self.pending:
            return True
        next_index = self.output_length + self.pending
        return next_index < self.max_tokens and not self.admit.sampling.changes_logits(next_index)

    def block_digest(self, index: int) -> bytes:
        """Return the prefix cache's name of full block ``index``, whose tokens must be known."""
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
        """Continue from ``computed`` tokens with KV and no step in flight."""
        self.computed = self.scheduled = computed

    def part_sent(self, part: SequenceStep) -> None:
        self.in_flight += 1
        self.scheduled += len(part.tokens)
        self.pending += part.sample

    def part_returned(self, part: SequenceStep) -> None:
        self.in_flight -= 1
        self.pending -= part.sample

    def is_kv_valid(self, part: SequenceStep) -> bool:
        """Return whether a completed part computed KV of known tokens that follows valid KV.

        It did not if an earlier step failed, or if it computed a sampled token that was not accepted.
        """
        return part.start == self.computed and part.start + len(part.tokens) <= len(self.history)

    def accept(self, sampled: Sampled, eos: frozenset[int]) -> TokenDelta:
        """Append the sampled token to the output and return the message for the gateway."""
        index, token, sampling = self.output_length, sampled.token, self.admit.sampling
        finish, stop_reason = finish_of(token, index, sampling, self.max_tokens, eos)
        # No step may build on a token that stops the request: it stays out of the history.
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
