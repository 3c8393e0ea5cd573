"""One request on this engine: its tokens, its KV blocks, and when it is finished. Pure."""

from enum import Enum

from loraserve.engine.schedule.blocks import chain, root
from loraserve.engine.schedule.events import DRAWN, Sampled, SequenceStep
from loraserve.messages import Admit, TokenDelta
from loraserve.messages.stop import STOP, finish_of


class State(Enum):
    """LEAVING has ended, but steps in flight still write to its blocks."""

    WAITING = "waiting"
    RUNNING = "running"
    LEAVING = "leaving"
    FINISHED = "finished"


# Compared with once a token: in Python 3.11 a member is a slow look-up in its class.
RUNNING, LEAVING = State.RUNNING, State.LEAVING


class Sequence:
    """Known tokens are the prompt and the output so far; ``computed`` of them have their KV.

    Steps in flight run ahead of that: ``scheduled`` tokens have their KV when they are done, and ``drawing`` more
    tokens exist then.
    """

    def __init__(self, admit: Admit, order: int, max_model_tokens: int, block_tokens: int) -> None:
        self.admit = admit
        self.order = order
        self.request_id = admit.request_id
        self.version = admit.adapter.version if admit.adapter else ""
        self.prompt_length = len(admit.prompt_tokens)
        self.history = list(admit.prompt_tokens)
        self.max_tokens = min(admit.sampling.max_tokens, max_model_tokens - self.prompt_length)
        self.state = State.WAITING
        self.slot = -1
        self.blocks: tuple[int, ...] = ()
        self.computed = 0
        self.scheduled = 0
        self.drawing = 0
        self.in_flight = 0
        self.cached_tokens = 0
        self.bypassed = 0
        self.read = 0
        """It began with this read of its adapter, and is in the step that shows whether that came in time."""
        self._block_tokens = block_tokens
        self._digests: list[bytes] = []

    @property
    def output_length(self) -> int:
        return len(self.history) - self.prompt_length

    @property
    def begun(self) -> bool:
        """It goes on with what was computed of it, now or once it runs again."""
        return self.state is RUNNING or (self.state is State.WAITING and self.output_length > 0)

    @property
    def remaining(self) -> int:
        """Known tokens whose KV is still to be computed; 1 while decoding."""
        return len(self.history) - self.computed

    @property
    def decoding(self) -> bool:
        """All known tokens have their KV but the last, which is of the output."""
        return self.prompt_length <= self.computed == len(self.history) - 1

    @property
    def unscheduled(self) -> int:
        """Tokens, known or being drawn, that no step computes yet."""
        return len(self.history) + self.drawing - self.scheduled

    @property
    def decodes_next(self) -> bool:
        """The same once the steps in flight are done."""
        return self.prompt_length <= self.scheduled == len(self.history) + self.drawing - 1

    @property
    def goes_ahead(self) -> bool:
        """Whether it can go on before the steps it is in are done."""
        if not self.drawing:
            return True
        next_index = self.output_length + self.drawing
        return next_index < self.max_tokens and not self.admit.sampling.changes_logits(next_index)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def digest(self, index: int) -> bytes:
        """Name of the content of full block ``index``; computed once, as the tokens become known."""
        while len(self._digests) <= index:
            start = len(self._digests) * self._block_tokens
            previous = self._digests[-1] if self._digests else root(self.version)
            self._digests.append(chain(previous, self.history[start : start + self._block_tokens]))
        return self._digests[index]

    def step(self, tokens: int) -> SequenceStep:
        """This sequence's part of a step that computes its next ``tokens`` tokens."""
        known = len(self.history) + self.drawing
        return SequenceStep(
            request_id=self.request_id,
            tokens=tuple(self.history[self.scheduled : self.scheduled + tokens]) or (DRAWN,),
            start=self.scheduled,
            blocks=self.blocks,
            sampling=self.admit.sampling,
            prompt_length=self.prompt_length,
            slot=self.slot,
            sample=self.scheduled + tokens == known,
            output_index=known - self.prompt_length,
            history=self.history,
        )

    def begin(self, computed: int) -> None:
        """From here on, or all over again: so many known tokens have their KV, and nothing is in flight."""
        self.computed = self.scheduled = computed

    def sent(self, part: SequenceStep) -> None:
        """A step with this part is on its way."""
        self.in_flight += 1
        self.scheduled += len(part.tokens)
        self.drawing += part.sample

    def landed(self, part: SequenceStep) -> None:
        """The step came back, done or failed."""
        self.in_flight -= 1
        self.drawing -= part.sample

    def skip(self, steps: int, token: int) -> None:
        """Of decode steps that were sent one by one as many have come back, each with this token; the next is out."""
        self.history.extend([token] * steps)
        self.computed += steps
        self.scheduled += steps

    def trusts(self, part: SequenceStep) -> bool:
        """Whether what a done step computed is the KV of known tokens, upon KV that is.

        It is not where a step before it failed, or drew a token that nobody took.
        """
        return part.start == self.computed and part.start + len(part.tokens) <= len(self.history)

    def accept(self, sampled: Sampled, eos: frozenset[int]) -> TokenDelta:
        """Add the drawn token to the output, and return what the gateway is sent."""
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
