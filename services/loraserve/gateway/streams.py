"""Token streams in flight, and detection of dead engines. No I/O and no clock.

``StreamTable`` delivers each token to the stream of its request, in order and once. A stream is interrupted if tokens
are lost, or if its engine dies or gives the request up. The next attempt of its request then continues it.
``EngineWatch`` decides whether an engine died or dropped a request.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from enum import Enum

import msgspec

from loraserve.gateway.errors import ApiError, refused
from loraserve.gateway.migration import Attempts, Cause, Interruption, Verdict, may_migrate
from loraserve.gateway.text.output import TokenLogprobs
from loraserve.messages import (
    ClusterLoad,
    EngineCapabilities,
    EngineCounters,
    EngineGone,
    EngineLoad,
    Failed,
    TokenBatch,
    TokenDelta,
)

ABORT_INTERVAL_S = 1.0
"""Minimum time between two aborts of the same request."""

ENDED_KEPT = 256
"""Maximum number of ended engine incarnations that the table remembers."""

CLOSED_KEPT = 4096
"""Maximum number of ended requests that the table remembers."""

RECENT_TOKENS_S = 1.0
"""Unless its process ended, an engine counts as alive this long after routing and after its last tokens."""

QUIET_S = 0.5
"""An engine that sent nothing for this time is pinged, if it runs streams of this gateway."""

END_LOST_AFTER_S = 1.5
"""If a report made this long after a request's last token omits the request, its last TokenDelta was lost."""

CLOCK_MARGIN_S = 0.25
"""Maximum error of a report's time. The time is computed without the delivery time of the publication."""


class StreamState(Enum):
    """States of a stream.

    ROUTING streams have no engine yet. The attempt of an INTERRUPTED stream ended early. The next attempt makes it
    ROUTING again. Only RUNNING streams accept tokens.
    """

    ROUTING = "routing"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    FINISHED = "finished"
    FAILED = "failed"


TRANSITIONS: dict[StreamState, frozenset[StreamState]] = {
    StreamState.ROUTING: frozenset((StreamState.RUNNING, StreamState.FAILED)),
    StreamState.RUNNING: frozenset((StreamState.INTERRUPTED, StreamState.FINISHED, StreamState.FAILED)),
    StreamState.INTERRUPTED: frozenset((StreamState.ROUTING, StreamState.FAILED)),
    StreamState.FINISHED: frozenset(),
    StreamState.FAILED: frozenset(),
}


class Received(msgspec.Struct, frozen=True):
    """All output of a stream since the last ``Stream.take``, merged into one object."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: str | None
    stop_reason: int | None = None


class Stream:
    """The unread tokens and the state of one request.

    ``request_id`` is the id of the current attempt, and ``output`` has the tokens of all attempts. Messages that arrive
    before the router's answer names the engine are kept in ``_early``.
    """

    def __init__(self, request_id: str, choice: int, attempts: Attempts, wake: Callable[["Stream"], None]) -> None:
        self.first_id = self.request_id = request_id
        self.choice = choice
        self.attempts = attempts
        self.interruption: Interruption | None = None
        self.suspects = 0
        """Number of requests that became suspects when the engine ended (see ``gateway.migration``)."""
        self.output: list[int] = []
        self.state = StreamState.ROUTING
        self.engine = ""
        self.incarnation = ""
        self.routed_s = 0.0
        self.last_token_s = 0.0
        self.cached_tokens = 0
        self.duplicate_tokens = 0
        self.finish: str | None = None
        self.stop_reason: int | None = None
        self.failure: ApiError | None = None
        self._wake = wake
        self._early: list[tuple[str, str, TokenDelta | Failed]] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    @property
    def is_over(self) -> bool:
        return not TRANSITIONS[self.state]

    @property
    def received_tokens(self) -> int:
        return len(self.output)

    def decide(self) -> Verdict:
        """Decide whether the interrupted request is migrated, tried alone, quarantined or given up."""
        return self.attempts.decide(self.suspects)

    def begin_attempt(self, request_id: str) -> None:
        """Wait for the engine of the next attempt, under another request id."""
        self._enter(StreamState.ROUTING)
        self.request_id, self.engine, self.incarnation = request_id, "", ""

    def set_engine(self, engine: str, incarnation: str, now: float) -> set[str]:
        """Accept only messages of this engine incarnation. Returns the other senders, where the caller must abort."""
        self.engine, self.incarnation = engine, incarnation
        self.routed_s = self.last_token_s = now
        if self.state is StreamState.ROUTING:
            self._enter(StreamState.RUNNING)
        early, self._early = self._early, []
        for sender, sender_incarnation, event in early:
            if isinstance(event, Failed):
                self.on_failed(event)
            elif (sender, sender_incarnation) == (engine, incarnation):
                self.on_delta(sender, sender_incarnation, event, now)
        return {sender for sender, _, _ in early} - {engine}

    def on_delta(self, engine: str, incarnation: str, delta: TokenDelta, now: float) -> bool:
        """Accept new tokens. Returns whether the sender may continue the request.

        Returns False if the sender is not this stream's engine incarnation, if tokens are missing before the new ones,
        or if the stream was interrupted or has failed.
        """
        if self.state is StreamState.ROUTING:
            self._early.append((engine, incarnation, delta))
            return True
        if (engine, incarnation) != (self.engine, self.incarnation):
            return False
        if self.state is not StreamState.RUNNING:
            return self.state is StreamState.FINISHED
        if delta.index > self.received_tokens:
            error = _lost_tokens(self.engine, self.received_tokens, delta.index)
            self.interrupt(Interruption(Cause.LOST, self.engine, error))
            return False
        self.last_token_s = now
        self._append(delta)
        return True

    def on_failed(self, failed: Failed) -> None:
        if self.state is StreamState.ROUTING:
            self._early.append((failed.engine, "", failed))
        elif failed.engine == self.engine:
            error = refused(failed.code, failed.message)
            if may_migrate(failed.code, self.received_tokens):
                cause = Cause.STEP_FAILED if failed.code == "engine_error" else Cause.REFUSED
                self.interrupt(Interruption(cause, self.engine, error))
            else:
                self.fail(error)

    def interrupt(self, interruption: Interruption) -> bool:
        """End the current attempt. Returns whether the request has become a suspect. Only a RUNNING stream changes."""
        if self.state is not StreamState.RUNNING:
            return False
        self.interruption = interruption
        self.suspects = 0
        self._enter(StreamState.INTERRUPTED)
        is_suspect = self.attempts.note(interruption, self.received_tokens)
        self._wake(self)
        return is_suspect

    def fail(self, error: ApiError) -> None:
        """End the stream. ``take`` raises the error after the unread tokens. Does nothing if the stream has ended."""
        if not self.is_over:
            self.failure = error
            self._enter(StreamState.FAILED)
            self._wake(self)

    def take(self) -> Received:
        """Return the output since the last call. Raises the stream's error after all tokens were taken."""
        if self.failure is not None and not self._tokens:
            raise self.failure
        received = Received(tuple(self._tokens), tuple(self._logprobs), self.finish, self.stop_reason)
        self._tokens, self._logprobs = [], []
        if self.failure is not None:
            self._wake(self)
        return received

    def _enter(self, state: StreamState) -> None:
        assert state in TRANSITIONS[self.state], f"{self.request_id}: {self.state} to {state}"
        self.state = state

    def _append(self, delta: TokenDelta) -> None:
        seen = self.received_tokens - delta.index
        tokens = delta.tokens[seen:] if seen else delta.tokens
        self.duplicate_tokens += min(seen, len(delta.tokens))
        if not tokens and (delta.finish is None or seen > len(delta.tokens)):
            return
        self._tokens.extend(tokens)
        self._logprobs.extend(delta.logprobs[seen:] if seen else delta.logprobs)
        self.output.extend(tokens)
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        if delta.finish is not None:
            self.finish, self.stop_reason = delta.finish, delta.stop_reason
            self._enter(StreamState.FINISHED)
        self._wake(self)


class StreamTable:
    """All streams of one gateway."""

    def __init__(self, dead_after_s: float, max_attempts: int) -> None:
        self.watch = EngineWatch(dead_after_s)
        self._max_attempts = max_attempts
        self.stray_deltas = 0
        self.duplicate_tokens = 0
        self._streams: dict[str, Stream] = {}
        self._ended: OrderedDict[tuple[str, str], None] = OrderedDict()
        """Engine incarnations whose processes ended."""
        self._closed: OrderedDict[str, float] = OrderedDict()
        """For each request without a stream, the time of its last abort or of its end."""

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, request_id: str, choice: int, wake: Callable[[Stream], None]) -> Stream:
        """Return a new stream. The stream calls ``wake`` with itself when it has unread output or an error."""
        if request_id in self._streams:
            raise ValueError(f"request id {request_id} is already in flight")
        stream = self._streams[request_id] = Stream(request_id, choice, Attempts(self._max_attempts), wake)
        return stream

    def begin_attempt(self, stream: Stream, now: float) -> None:
        """Give the interrupted stream the id of its next attempt. Late tokens of the last attempt find no stream."""
        del self._streams[stream.request_id]
        self._note_closed(stream.request_id, now - ABORT_INTERVAL_S)
        stream.begin_attempt(f"{stream.first_id}.{stream.attempts.number}")
        self._streams[stream.request_id] = stream

    def set_engine(self, stream: Stream, engine: str, incarnation: str, now: float) -> set[str]:
        """Call ``Stream.set_engine``. Interrupt the stream if the engine's process ended before the router's answer."""
        others = stream.set_engine(engine, incarnation, now)
        if (engine, incarnation) in self._ended:
            _interrupt_together([(stream, _engine_died(stream, Cause.DIED, "its process ended"))])
        return others

    def close(self, stream: Stream, now: float) -> None:
        """Remove a stream. ``on_batch`` returns the id of its request if tokens arrive ABORT_INTERVAL_S later."""
        if self._streams.pop(stream.request_id, None) is not None:
            self.duplicate_tokens += stream.duplicate_tokens
            self._note_closed(stream.request_id, now)

    def on_batch(self, batch: TokenBatch, now: float) -> list[str]:
        """Deliver the tokens of one batch. Returns the ids of requests that the sending engine must drop."""
        self.watch.note_heard(batch.engine, batch.incarnation, now)
        unwanted = []
        for delta in batch.deltas:
            stream = self._streams.get(delta.request_id)
            if stream is None or not stream.on_delta(batch.engine, batch.incarnation, delta, now):
                self.stray_deltas += 1
                if delta.finish is None and self._may_abort(delta.request_id, now):
                    unwanted.append(delta.request_id)
        return unwanted

    def on_failed(self, failed: Failed) -> None:
        stream = self._streams.get(failed.request_id)
        if stream is not None:
            stream.on_failed(failed)

    def on_cluster_load(self, load: ClusterLoad, now: float) -> None:
        """Interrupt the streams whose engine died or is silent, and those whose final message was lost."""
        self.watch.note_cluster_load(load, now)
        ended: dict[tuple[str, str], list[tuple[Stream, Interruption]]] = {}
        for stream in self._running():
            death = self.watch.death_of(stream.engine, stream.incarnation, stream.routed_s, now)
            if death is not None:
                interruption = _engine_died(stream, *death)
                ended.setdefault((stream.engine, stream.incarnation), []).append((stream, interruption))
            elif self.watch.dropped(stream.engine, stream.incarnation, stream.request_id, stream.last_token_s):
                error = _lost_end(stream.engine, stream.received_tokens)
                stream.interrupt(Interruption(Cause.LOST, stream.engine, error))
        for interruptions in ended.values():
            _interrupt_together(interruptions)

    def on_engine_gone(self, gone: EngineGone) -> None:
        """Interrupt the streams of an engine whose process ended."""
        if gone.ended:
            self._end(gone.engine, gone.incarnation, "its process ended")

    def on_restarted(self, engine: str, incarnation: str) -> None:
        """Interrupt the streams of an engine of which another incarnation answered."""
        self._end(engine, incarnation, "it was restarted")

    def quiet_engines(self, now: float) -> list[tuple[str, str]]:
        """Return the engines, with their incarnations, that run streams and sent nothing for QUIET_S."""
        routed_s: dict[tuple[str, str], float] = {}
        for stream in self._running():
            pair = stream.engine, stream.incarnation
            routed_s[pair] = min(stream.routed_s, routed_s.get(pair, now))
        return [pair for pair, since_s in routed_s.items() if now - self.watch.heard_s(*pair, since_s) >= QUIET_S]

    def on_no_answer(self, engine: str, incarnation: str, asked_s: float) -> None:
        """Interrupt the streams of an engine that neither answered a ping sent at ``asked_s`` nor sent tokens since."""
        for stream in self._running():
            is_there = (stream.engine, stream.incarnation) == (engine, incarnation)
            if is_there and self.watch.heard_s(engine, incarnation, stream.routed_s) < asked_s:
                stream.interrupt(_engine_died(stream, Cause.SILENT, "it does not answer this gateway"))

    def fail_all(self, error: ApiError) -> None:
        for stream in self._streams.values():
            stream.fail(error)

    def validate(self) -> None:
        """Check the invariants of all streams. Raises AssertionError."""
        for request_id, stream in self._streams.items():
            assert stream.request_id == request_id
            assert (stream.finish is not None) == (stream.state is StreamState.FINISHED)
            assert (stream.failure is not None) == (stream.state is StreamState.FAILED)
            assert stream.engine or not stream.received_tokens or stream.attempts.number
            assert stream.interruption is not None or not stream.attempts.number
            assert not (stream.engine and stream._early)

    def _end(self, engine: str, incarnation: str, why: str) -> None:
        self._ended[engine, incarnation] = None
        if len(self._ended) > ENDED_KEPT:
            self._ended.popitem(last=False)
        streams = [s for s in self._running() if (s.engine, s.incarnation) == (engine, incarnation)]
        _interrupt_together([(stream, _engine_died(stream, Cause.DIED, why)) for stream in streams])

    def _running(self) -> list[Stream]:
        return [stream for stream in self._streams.values() if stream.state is StreamState.RUNNING]

    def _may_abort(self, request_id: str, now: float) -> bool:
        last = self._closed.get(request_id)
        if last is not None and now - last < ABORT_INTERVAL_S:
            return False
        self._note_closed(request_id, now)
        return True

    def _note_closed(self, request_id: str, now: float) -> None:
        self._closed[request_id] = now
        self._closed.move_to_end(request_id)
        while len(self._closed) > CLOSED_KEPT:
            self._closed.popitem(last=False)


class EngineReport(msgspec.Struct, frozen=True):
    """An engine's last report from the monitor. ``reported_s`` is the report's time on the gateway's clock."""

    load: EngineLoad
    capabilities: EngineCapabilities
    reported_s: float
    alive: bool


class EngineWatch:
    """Detects dead engines and dropped requests from the last report of each engine and the time of its last tokens."""

    def __init__(self, dead_after_s: float) -> None:
        self.reports: dict[str, EngineReport] = {}
        self.counters: dict[str, EngineCounters] = {}
        self.cluster: ClusterLoad | None = None
        self.cluster_s = 0.0
        self._dead_after_s = dead_after_s
        self._monitor = ""
        self._monitor_since_s = 0.0
        self._heard_s: dict[str, tuple[str, float]] = {}
        """For each engine, the incarnation that last sent tokens or answered a ping, and when."""

    def note_cluster_load(self, load: ClusterLoad, now: float) -> None:
        """Store a publication of the monitor. Report times are ``now`` minus the published ages."""
        if load.incarnation != self._monitor:
            self._monitor, self._monitor_since_s = load.incarnation, now
        self.cluster, self.cluster_s = load, now
        self.reports = {
            seen.engine: EngineReport(seen.load, seen.capabilities, now - seen.age_s, seen.alive)
            for seen in load.engines
        }

    def note_statistics(self, counters: dict[str, EngineCounters]) -> None:
        self.counters = counters

    def note_heard(self, engine: str, incarnation: str, now: float) -> None:
        """Record that the engine sent tokens or answered a ping."""
        self._heard_s[engine] = (incarnation, now)

    def heard_s(self, engine: str, incarnation: str, routed_s: float) -> float:
        """Return when the engine incarnation was last heard, at the earliest ``routed_s``."""
        sender, heard_s = self._heard_s.get(engine, ("", 0.0))
        return max(routed_s, heard_s) if sender == incarnation else routed_s

    def ready_engines(self, now: float) -> list[str]:
        """Return the engines that accept requests, or none if the last publication is older than 4 * dead_after_s."""
        if now - self.cluster_s > 4 * self._dead_after_s:
            return []
        return [name for name, report in self.reports.items() if report.alive and report.load.state == "READY"]

    def death_of(self, engine: str, incarnation: str, routed_s: float, now: float) -> tuple[Cause, str] | None:
        """Return the cause and the reason if the engine incarnation died after ``routed_s``; None if it is alive."""
        alive_s = self.heard_s(engine, incarnation, routed_s)
        if now - alive_s < RECENT_TOKENS_S:
            return None
        report = self.reports.get(engine)
        if report is None:
            # A monitor that has just started does not know all engines.
            silent_s = now - max(self._monitor_since_s, alive_s)
            return (Cause.SILENT, "it is not in the cluster any more") if silent_s > 2 * self._dead_after_s else None
        if report.load.incarnation != incarnation:
            return (Cause.DIED, "it was restarted") if report.reported_s > routed_s + CLOCK_MARGIN_S else None
        if not report.alive and now - alive_s > self._dead_after_s:
            return Cause.SILENT, "it stopped reporting"
        return None

    def dropped(self, engine: str, incarnation: str, request_id: str, silent_since_s: float) -> bool:
        """Return whether a report later than ``silent_since_s`` + END_LOST_AFTER_S no longer lists the request."""
        report = self.reports.get(engine)
        if report is None or report.load.incarnation != incarnation:
            return False
        queue = report.load.queue
        if len(queue.request_ids) != queue.running + queue.waiting:
            # The report contradicts itself, so a missing request may still run.
            return False
        return report.reported_s > silent_since_s + END_LOST_AFTER_S and request_id not in queue.request_ids


def _lost_tokens(engine: str, expected: int, found: int) -> ApiError:
    message = f"tokens {expected} to {found - 1} from {engine} were lost on the way; send the request again"
    return refused("stream_interrupted", message)


def _lost_end(engine: str, received_tokens: int) -> ApiError:
    message = f"what {engine} sent after {received_tokens} tokens was lost on the way; send the request again"
    return refused("stream_interrupted", message)


def _engine_died(stream: Stream, cause: Cause, why: str) -> Interruption:
    message = f"engine {stream.engine} died while it ran this request ({why}, {stream.received_tokens} tokens received)"
    return Interruption(cause, stream.engine, refused("engine_died", f"{message}; send the request again"))


def _interrupt_together(interruptions: Sequence[tuple[Stream, Interruption]]) -> None:
    """Interrupt the streams of one ended engine, and store the number of suspects in each suspect."""
    suspects = [stream for stream, interruption in interruptions if stream.interrupt(interruption)]
    for stream in suspects:
        stream.suspects = len(suspects)
