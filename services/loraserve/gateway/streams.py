"""The streams in flight: tokens by request id, in order, once each; what is lost or died fails its stream. Pure."""

from collections import OrderedDict
from collections.abc import Callable

import msgspec

from loraserve.gateway.errors import ApiError, refused
from loraserve.gateway.text.output import TokenLogprobs
from loraserve.messages import ClusterLoad, EngineLoad, Failed, TokenBatch, TokenDelta

ABORT_AGAIN_S = 1.0
STRAYS_KEPT = 4096


class Progress(msgspec.Struct, frozen=True):
    """Everything that came since the last look; a slow reader gets more at once, so memory stays one output's."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: str | None
    stop_reason: int | None = None


class Stream:
    """One request's tokens on their way from its engine to its reader.

    Tokens may come before the router's answer says from which engine to take them: they wait in ``_early``.
    """

    def __init__(self, request_id: str, choice: int, wake: Callable[["Stream"], None]) -> None:
        self.request_id = request_id
        self.choice = choice
        self.engine = ""
        self.incarnation = ""
        self.routed_s = 0.0
        self.heard_s = 0.0
        self.received_tokens = 0
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
        return self.finish is not None or self.failure is not None

    def routed(self, engine: str, incarnation: str, now: float) -> set[str]:
        """From now on only this engine's tokens count. Returns other engines that sent some."""
        self.engine, self.incarnation = engine, incarnation
        self.routed_s = self.heard_s = now
        early, self._early = self._early, []
        for sender, past, event in early:
            if isinstance(event, Failed):
                self.on_failed(event)
            elif (sender, past) == (engine, incarnation):
                self.on_delta(sender, past, event, now)
        return {sender for sender, _, _ in early} - {engine}

    def on_delta(self, engine: str, incarnation: str, delta: TokenDelta, now: float) -> bool:
        """False when the sender should be told to stop: it is not this stream's engine, or the stream failed."""
        if not self.engine:
            self._early.append((engine, incarnation, delta))
            return True
        if (engine, incarnation) != (self.engine, self.incarnation):
            return False
        if self.is_over:
            return self.failure is None
        if delta.index > self.received_tokens:
            self.fail(_gap(self.engine, self.received_tokens, delta.index))
            return False
        self.heard_s = now
        self._append(delta)
        return True

    def on_failed(self, failed: Failed) -> None:
        if not self.engine:
            self._early.append((failed.engine, "", failed))
        elif failed.engine == self.engine:
            self.fail(refused(failed.code, failed.message))

    def fail(self, error: ApiError) -> None:
        """What came before is still delivered; the first failure stays."""
        if not self.is_over:
            self.failure = error
            self._wake(self)

    def take(self) -> Progress:
        """What came since the last call. Raises the stream's failure once everything before it was taken."""
        if self.failure is not None and not self._tokens:
            raise self.failure
        progress = Progress(tuple(self._tokens), tuple(self._logprobs), self.finish, self.stop_reason)
        self._tokens, self._logprobs = [], []
        if self.failure is not None:
            self._wake(self)
        return progress

    def _append(self, delta: TokenDelta) -> None:
        seen = self.received_tokens - delta.index
        tokens = delta.tokens[seen:] if seen else delta.tokens
        self.duplicate_tokens += min(seen, len(delta.tokens))
        if not tokens and (delta.finish is None or seen > len(delta.tokens)):
            return
        self._tokens.extend(tokens)
        self._logprobs.extend(delta.logprobs[seen:] if seen else delta.logprobs)
        self.received_tokens += len(tokens)
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        if delta.finish == "abort":
            self.failure = refused("engine_error", f"{self.engine} aborted the request")
        else:
            self.finish, self.stop_reason = delta.finish, delta.stop_reason
        self._wake(self)


class StreamTable:
    """All streams of one gateway. Its methods return which engines to tell that nobody waits for which request."""

    def __init__(self, dead_after_s: float) -> None:
        self.watch = EngineWatch(dead_after_s)
        self.stray_deltas = 0
        self.duplicate_tokens = 0
        self._streams: dict[str, Stream] = {}
        self._strays: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, request_id: str, choice: int, wake: Callable[[Stream], None]) -> Stream:
        """Before the router is asked, so that no token can come too early."""
        if request_id in self._streams:
            raise ValueError(f"request id {request_id} is already in flight")
        stream = self._streams[request_id] = Stream(request_id, choice, wake)
        return stream

    def close(self, stream: Stream, now: float) -> None:
        """Forget it. What its engine still sends is answered with an abort, at the earliest after a while."""
        if self._streams.pop(stream.request_id, None) is not None:
            self.duplicate_tokens += stream.duplicate_tokens
            self._note_stray(stream.request_id, now)

    def on_batch(self, batch: TokenBatch, now: float) -> list[str]:
        """Deliver one engine step. Returns ids of requests that the sender should abort."""
        self.watch.heard(batch.engine, batch.incarnation, now)
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
        """Fail the streams whose engine went away, or ended them without our hearing of it."""
        self.watch.observe(load, now)
        for stream in self._streams.values():
            if not stream.engine or stream.is_over:
                continue
            why = self.watch.gone(stream.engine, stream.incarnation, stream.routed_s, now)
            if why:
                stream.fail(_died(stream.engine, why, stream.received_tokens))
            elif self.watch.has_ended(stream.engine, stream.incarnation, stream.request_id, stream.heard_s):
                stream.fail(_end_lost(stream.engine, stream.received_tokens))

    def fail_all(self, error: ApiError) -> None:
        for stream in self._streams.values():
            stream.fail(error)

    def validate(self) -> None:
        """Raises AssertionError where the table contradicts itself."""
        for request_id, stream in self._streams.items():
            assert stream.request_id == request_id
            assert not (stream.finish and stream.failure)
            assert stream.engine or not stream.received_tokens
            assert not (stream.engine and stream._early)

    def story(self, request_id: str) -> str:
        """What is known of one request, for people."""
        stream = self._streams.get(request_id)
        if stream is None:
            return f"{request_id}: not in flight here"
        where = f"on {stream.engine} ({stream.incarnation})" if stream.engine else "waiting for an engine"
        end = stream.finish or (stream.failure and stream.failure.message) or "running"
        return f"{request_id}: {where}, {stream.received_tokens} tokens received, {end}"

    def _may_abort(self, request_id: str, now: float) -> bool:
        last = self._strays.get(request_id)
        if last is not None and now - last < ABORT_AGAIN_S:
            return False
        self._note_stray(request_id, now)
        return True

    def _note_stray(self, request_id: str, now: float) -> None:
        self._strays[request_id] = now
        self._strays.move_to_end(request_id)
        while len(self._strays) > STRAYS_KEPT:
            self._strays.popitem(last=False)


def _gap(engine: str, expected: int, found: int) -> ApiError:
    message = f"tokens {expected} to {found - 1} from {engine} were lost on the way; send the request again"
    return refused("stream_interrupted", message)


def _end_lost(engine: str, received_tokens: int) -> ApiError:
    message = f"what {engine} sent after {received_tokens} tokens was lost on the way; send the request again"
    return refused("stream_interrupted", message)


def _died(engine: str, why: str, received_tokens: int) -> ApiError:
    message = f"engine {engine} went away while it ran this request ({why}, {received_tokens} tokens received)"
    return refused("engine_died", message)


# MERGED: loraserve.gateway.streams
# """Is the engine of a stream still there? Judged from the monitor's reports and from its tokens. Pure."""


HEARD_RECENTLY_S = 1.0
"""An engine whose token came this recently lives, whatever a report says: reports are older than tokens."""

LOST_AFTER_S = 1.5
"""A request that its engine no longer has this long after the last token has ended, and the end was lost."""

CLOCK_MARGIN_S = 0.25
"""A report is dated from its age when published; the way from there to here takes time too."""


class EngineReport(msgspec.Struct, frozen=True):
    load: EngineLoad
    reported_s: float
    alive: bool


class EngineWatch:
    """Last reports of all engines, and who was heard when."""

    def __init__(self, dead_after_s: float) -> None:
        self.reports: dict[str, EngineReport] = {}
        self.cluster: ClusterLoad | None = None
        self.cluster_s = 0.0
        self._dead_after_s = dead_after_s
        self._monitor = ""
        self._monitor_since_s = 0.0
        self._heard: dict[str, tuple[str, float]] = {}

    def observe(self, load: ClusterLoad, now: float) -> None:
        """A publication of the monitor arrived; the ages in it are from when it was sent."""
        if load.incarnation != self._monitor:
            self._monitor, self._monitor_since_s = load.incarnation, now
        self.cluster, self.cluster_s = load, now
        self.reports = {
            seen.load.engine: EngineReport(seen.load, now - seen.age_s, seen.alive) for seen in load.engines
        }

    def heard(self, engine: str, incarnation: str, now: float) -> None:
        """Tokens came from it."""
        self._heard[engine] = (incarnation, now)

    def ready_engines(self, now: float) -> list[str]:
        """Engines that take requests now; none when the monitor itself has been silent for long."""
        if now - self.cluster_s > 4 * self._dead_after_s:
            return []
        return [name for name, report in self.reports.items() if report.alive and report.load.state == "READY"]

    def gone(self, engine: str, incarnation: str, routed_s: float, now: float) -> str:
        """Why a stream that went to this incarnation of the engine at ``routed_s`` cannot finish, or ""."""
        who, heard_s = self._heard.get(engine, ("", 0.0))
        proof_s = max(routed_s, heard_s) if who == incarnation else routed_s
        if now - proof_s < HEARD_RECENTLY_S:
            return ""
        report = self.reports.get(engine)
        if report is None:
            # A monitor that has just started has not heard of everybody yet.
            silent_s = now - max(self._monitor_since_s, proof_s)
            return "it is not in the cluster any more" if silent_s > 2 * self._dead_after_s else ""
        if report.load.incarnation != incarnation:
            return "it was restarted" if report.reported_s > routed_s + CLOCK_MARGIN_S else ""
        if not report.alive and now - proof_s > self._dead_after_s:
            return "it stopped reporting"
        return ""

    def has_ended(self, engine: str, incarnation: str, request_id: str, silent_since_s: float) -> bool:
        """Whether the engine listed its requests well after ``silent_since_s`` and this one is not among them."""
        report = self.reports.get(engine)
        if report is None or report.load.incarnation != incarnation:
            return False
        load = report.load
        lists_all = len(load.request_ids) == load.running + load.waiting
        return lists_all and report.reported_s > silent_since_s + LOST_AFTER_S and request_id not in load.request_ids
