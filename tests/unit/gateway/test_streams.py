"""Streams deliver tokens in order, once each, from the right engine; any other stream fails alone."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.gateway.errors import ApiError, refused
from loraserve.gateway.migration import Verdict
from loraserve.gateway.streams import ABORT_INTERVAL_S, QUIET_S, Stream, StreamState, StreamTable
from loraserve.messages import ClusterLoad, EngineGone, EngineSeen, Failed, QueueLoad, TokenBatch, TokenDelta
from loraserve.testing import reports

INCARNATION = "a" * 16


def batch(*deltas: TokenDelta, engine: str = "engine-0", incarnation: str = INCARNATION) -> TokenBatch:
    return TokenBatch(engine=engine, incarnation=incarnation, deltas=deltas)


def cluster_load(*seen: EngineSeen, monitor: str = "m") -> ClusterLoad:
    return ClusterLoad(incarnation=monitor, sequence=1, engines=seen)


def engine_seen(
    name: str = "engine-0", incarnation: str = INCARNATION, age_s: float = 0.0, alive: bool = True
) -> EngineSeen:
    return reports.engine_seen(name, age_s=age_s, alive=alive, incarnation=incarnation, running=1)


class Table:
    """A table with streams routed to engine-0 at time 0; ``woken`` lists the wake-ups."""

    def __init__(self, *request_ids: str, route: bool = True) -> None:
        self.woken: list[str] = []
        self.table = StreamTable(dead_after_s=1.5, max_attempts=3)
        self.streams = {id_: self.table.open(id_, 0, self.wake) for id_ in request_ids}
        for stream in self.streams.values() if route else ():
            assert stream.set_engine("engine-0", INCARNATION, 0.0) == set()

    def wake(self, stream: Stream) -> None:
        self.woken.append(stream.request_id)

    def tokens(self, request_id: str) -> list[int]:
        return list(self.streams[request_id].take().tokens)


def failure(stream: Stream) -> ApiError:
    with pytest.raises(ApiError) as caught:
        stream.take()
    return caught.value


def interruption(stream: Stream) -> ApiError:
    """Return the error that the client gets if no other attempt follows."""
    assert (stream.state, stream.failure) == (StreamState.INTERRUPTED, None)
    assert stream.interruption is not None
    return stream.interruption.error


def test_a_batch_wakes_each_reader_once() -> None:
    here = Table("a", "b", "c")
    assert here.table.on_batch(batch(TokenDelta("a", 0, (1,)), TokenDelta("c", 0, (7, 8), "stop")), 1.0) == []
    assert here.woken == ["a", "c"]
    assert here.tokens("a") == [1]
    received_now = here.streams["c"].take()
    assert (received_now.tokens, received_now.finish) == ((7, 8), "stop")
    here.table.validate()


def test_a_slow_reader_receives_everything_in_one_call() -> None:
    here = Table("a")
    for index in range(100):
        here.table.on_batch(batch(TokenDelta("a", index, (index,), logprobs=((-1.0, ()),))), 1.0)
    received_now = here.streams["a"].take()
    assert received_now.tokens == tuple(range(100))
    assert len(received_now.logprobs) == 100


def test_tokens_before_the_route_are_kept_and_another_engine_is_told_to_stop() -> None:
    here = Table("a", route=False)
    here.table.on_batch(batch(TokenDelta("a", 0, (1,))), 0.0)
    here.table.on_batch(batch(TokenDelta("a", 0, (9,)), engine="engine-1"), 0.0)
    here.table.on_batch(batch(TokenDelta("a", 1, (2,))), 0.0)
    assert here.woken == []
    here.table.validate()
    assert here.streams["a"].set_engine("engine-0", INCARNATION, 0.1) == {"engine-1"}
    assert here.tokens("a") == [1, 2]
    assert here.table.on_batch(batch(TokenDelta("a", 1, (9,)), engine="engine-1"), 0.2) == ["a"]
    here.table.validate()


def test_a_failure_before_the_route_counts_if_the_chosen_engine_sent_it() -> None:
    for engine, fails in (("engine-0", True), ("engine-1", False)):
        here = Table("a", route=False)
        here.table.on_failed(Failed(request_id="a", engine=engine, code="adapter_unavailable", message="gone"))
        here.streams["a"].set_engine("engine-0", INCARNATION, 0.1)
        assert (here.streams["a"].state is StreamState.INTERRUPTED) == fails


def test_a_gap_fails_its_stream_after_the_tokens_before_the_gap() -> None:
    here = Table("a", "b")
    here.table.on_batch(batch(TokenDelta("a", 0, (1, 2)), TokenDelta("b", 0, (5,))), 0.0)
    unwanted = here.table.on_batch(batch(TokenDelta("a", 3, (4,)), TokenDelta("b", 1, (6,))), 0.0)
    assert unwanted == ["a"]
    assert here.tokens("a") == [1, 2]
    assert interruption(here.streams["a"]).code == "stream_interrupted"
    assert "2 to 2" in interruption(here.streams["a"]).message
    assert here.tokens("b") == [5, 6]


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=12), repeats=st.lists(st.integers(0, 11)), data=st.data()
)
def test_repeated_deltas_change_nothing(lengths: list[int], repeats: list[int], data: st.DataObject) -> None:
    here = Table("a")
    sent, deltas = 0, []
    for number, length in enumerate(lengths):
        finish = "length" if number == len(lengths) - 1 else None
        deltas.append(TokenDelta("a", sent, tuple(range(sent, sent + length)), finish))
        sent += length
    order = [index for number in range(len(deltas)) for index in (number, *(r for r in repeats if r <= number))]
    received: list[int] = []
    for index in order:
        here.table.on_batch(batch(deltas[index]), 0.0)
        if data.draw(st.booleans()):
            received += here.tokens("a")
    received_now = here.streams["a"].take()
    assert received + list(received_now.tokens) == list(range(sent))
    assert received_now.finish == "length"
    here.table.validate()


def test_overlapping_tokens_are_dropped_with_their_logprobs() -> None:
    here = Table("a")
    here.table.on_batch(batch(TokenDelta("a", 0, (1, 2), logprobs=((-1.0, ()), (-2.0, ())))), 0.0)
    here.table.on_batch(batch(TokenDelta("a", 1, (2, 3), logprobs=((-2.0, ()), (-3.0, ())))), 0.0)
    received_now = here.streams["a"].take()
    assert received_now.tokens == (1, 2, 3)
    assert [own for own, _ in received_now.logprobs] == [-1.0, -2.0, -3.0]
    assert here.streams["a"].duplicate_tokens == 1


def test_unknown_requests_are_aborted_at_intervals() -> None:
    table = StreamTable(dead_after_s=1.5, max_attempts=3)
    assert table.on_batch(batch(TokenDelta("old", 3, (1,))), 0.0) == ["old"]
    assert table.on_batch(batch(TokenDelta("old", 4, (1,))), 0.1) == []
    assert table.on_batch(batch(TokenDelta("old", 5, (1,))), 0.1 + ABORT_INTERVAL_S) == ["old"]
    assert table.on_batch(batch(TokenDelta("done", 9, (1,), "stop")), 0.0) == []
    assert table.stray_deltas == 4


def test_closed_requests_are_forgotten_in_time() -> None:
    table = StreamTable(dead_after_s=1.5, max_attempts=3)
    for number in range(10_000):
        table.on_batch(batch(TokenDelta(str(number), 0, (1,))), 0.0)
    assert len(table._closed) < 5000


def test_a_request_id_is_in_flight_once() -> None:
    here = Table("a")
    with pytest.raises(ValueError, match="already in flight"):
        here.table.open("a", 0, here.wake)
    here.table.close(here.streams["a"], 0.0)
    here.table.close(here.streams["a"], 0.0)
    here.table.open("a", 0, here.wake)
    assert len(here.table) == 1


def test_tokens_before_a_failure_on_the_engine_are_delivered() -> None:
    here = Table("a")
    here.table.on_batch(batch(TokenDelta("a", 0, (1,))), 0.0)
    here.table.on_failed(Failed(request_id="a", engine="engine-0", code="engine_error", message="a step failed"))
    assert here.tokens("a") == [1]
    assert interruption(here.streams["a"]).status == 500


def test_a_failure_keeps_the_code_of_the_engine() -> None:
    here = Table("a")
    here.table.on_failed(Failed(request_id="a", engine="engine-0", code="overloaded", message="full"))
    error = interruption(here.streams["a"])
    assert (error.status, error.code, dict(error.headers)) == (429, "overloaded", {"Retry-After": "1"})
    here.table.on_failed(Failed(request_id="nobody", engine="engine-0", code="x", message=""))


@pytest.mark.parametrize(
    "load",
    [
        cluster_load(engine_seen(incarnation="b" * 16)),
        cluster_load(engine_seen(alive=False, age_s=3.0)),
        cluster_load(),
    ],
)
def test_a_dead_engine_fails_its_own_streams(load: ClusterLoad) -> None:
    here = Table("a", "b", "c")
    here.streams["b"] = here.table.open("b2", 0, here.wake)
    here.streams["b"].set_engine("engine-1", INCARNATION, 0.0)
    unrouted = here.table.open("d", 0, here.wake)
    other = engine_seen("engine-1")
    here.table.on_cluster_load(cluster_load(engine_seen(), other), 0.5)
    here.table.on_batch(batch(TokenDelta("a", 0, (1,)), TokenDelta("c", 0, (3,), "stop")), 1.0)
    late = cluster_load(*load.engines, other)
    here.table.on_cluster_load(late, 1.5)
    assert here.streams["a"].state is StreamState.RUNNING, "its tokens arrived just now"
    here.table.on_cluster_load(late, 6.0)
    assert here.tokens("a") == [1]
    error = interruption(here.streams["a"])
    assert (error.status, error.code) == (503, "engine_died")
    assert "engine engine-0 died" in error.message
    assert here.streams["b"].state is StreamState.RUNNING
    assert here.streams["c"].take().finish == "stop"
    assert unrouted.state is StreamState.ROUTING
    here.table.validate()


def test_old_reports_do_not_fail_a_request_routed_to_a_restarted_engine() -> None:
    table = StreamTable(dead_after_s=1.5, max_attempts=3)
    stream = table.open("a", 0, lambda _: None)
    stream.set_engine("engine-0", "new", 10.0)
    for now, age_s in ((10.1, 0.2), (10.5, 0.6), (11.2, 1.3)):
        table.on_cluster_load(cluster_load(engine_seen(incarnation="old", age_s=age_s)), now)
        assert stream.state is StreamState.RUNNING
    table.on_cluster_load(cluster_load(engine_seen(incarnation="new")), 11.5)
    assert stream.state is StreamState.RUNNING
    table.on_cluster_load(cluster_load(engine_seen(incarnation="newer")), 12.0)
    assert stream.state is StreamState.INTERRUPTED


def test_a_lost_end_is_noticed_when_the_engine_stops_listing_the_request() -> None:
    here = Table("a", "b")
    here.table.on_batch(batch(TokenDelta("a", 0, (1,))), 1.0)

    def report(now: float, *request_ids: str, running: int) -> bool:
        seen = engine_seen()
        load = msgspec.structs.replace(seen.load, queue=QueueLoad(request_ids=request_ids, running=running))
        here.table.on_cluster_load(cluster_load(msgspec.structs.replace(seen, load=load)), now)
        return here.streams["a"].state is StreamState.INTERRUPTED

    assert not report(2.0, "b", running=1), "too soon: the end may still be on its way"
    assert not report(5.0, "a", "b", running=2)
    assert not report(6.0, "b", running=2), "the list is not complete"
    assert report(7.0, "b", running=1)
    assert here.tokens("a") == [1]
    assert interruption(here.streams["a"]).code == "stream_interrupted"
    assert here.streams["b"].state is StreamState.RUNNING


def test_a_restarted_monitor_without_engines_fails_no_stream() -> None:
    here = Table("a")
    here.table.on_cluster_load(cluster_load(engine_seen()), 1.0)
    for now in (20.0, 20.25, 21.0, 22.0):
        here.table.on_cluster_load(cluster_load(monitor="m2"), now)
        assert here.streams["a"].state is StreamState.RUNNING
    here.table.on_cluster_load(cluster_load(monitor="m2"), 24.0)
    assert here.streams["a"].state is StreamState.INTERRUPTED


def test_ready_engines() -> None:
    table = StreamTable(dead_after_s=1.5, max_attempts=3)
    assert table.watch.ready_engines(0.0) == []
    table.on_cluster_load(cluster_load(engine_seen(), engine_seen("engine-1", alive=False)), 1.0)
    assert table.watch.ready_engines(1.5) == ["engine-0"]
    assert table.watch.ready_engines(60.0) == []


def test_states_of_a_stream() -> None:
    here = Table("a", route=False)
    stream = here.streams["a"]
    states = [stream.state]
    assert not stream.is_over
    stream.set_engine("engine-0", INCARNATION, 0.0)
    states.append(stream.state)
    here.table.on_batch(batch(TokenDelta("a", 0, (1, 2), "stop", stop_reason=2)), 0.0)
    states.append(stream.state)
    assert states == [StreamState.ROUTING, StreamState.RUNNING, StreamState.FINISHED]
    assert here.streams["a"].take().stop_reason == 2
    stream.fail(refused("engine_died", "too late"))
    assert (stream.state, stream.failure) == (StreamState.FINISHED, None)


def test_a_stream_that_failed_while_it_was_routed_stays_failed() -> None:
    here = Table("a", route=False)
    here.table.fail_all(refused("shutting_down", "why"))
    here.streams["a"].set_engine("engine-0", INCARNATION, 0.0)
    assert here.streams["a"].state is StreamState.FAILED
    assert failure(here.streams["a"]).message == "why"
    here.table.validate()


def test_an_interrupted_stream_continues_with_the_next_attempt() -> None:
    here = Table("a")
    stream = here.streams["a"]
    here.table.on_batch(batch(TokenDelta("a", 0, (1, 2), cached_tokens=5)), 0.5)
    here.table.on_engine_gone(EngineGone(engine="engine-0", incarnation=INCARNATION, ended=True))
    assert here.tokens("a") == [1, 2]
    assert (stream.state, stream.decide()) == (StreamState.INTERRUPTED, Verdict.MIGRATE)
    here.table.begin_attempt(stream, 0.6)
    assert (stream.request_id, stream.state, stream.attempts.avoid) == ("a.1", StreamState.ROUTING, ("engine-0",))
    assert here.table.on_batch(batch(TokenDelta("a", 2, (9,))), 0.6) == ["a"], "the old attempt is unknown now"
    stream.set_engine("engine-1", "b" * 16, 0.7)
    delta = TokenDelta("a.1", 2, (3,), "length")
    assert here.table.on_batch(batch(delta, engine="engine-1", incarnation="b" * 16), 0.8) == []
    assert here.tokens("a") == [3]
    assert (stream.output, stream.finish, stream.cached_tokens) == ([1, 2, 3], "length", 5)
    here.table.validate()


def test_only_an_engine_that_certainly_ended_interrupts_its_streams_at_once() -> None:
    here = Table("a")
    here.table.on_engine_gone(EngineGone(engine="engine-0", incarnation=INCARNATION, ended=False))
    here.table.on_engine_gone(EngineGone(engine="engine-0", incarnation="another", ended=True))
    here.table.on_engine_gone(EngineGone(engine="engine-1", incarnation=INCARNATION, ended=True))
    assert here.streams["a"].state is StreamState.RUNNING


@pytest.mark.parametrize(
    ("code", "tokens", "migrates"),
    [
        ("draining", 1, True),
        ("engine_error", 0, True),
        ("adapter_unavailable", 0, True),
        ("adapter_damaged", 0, True),
        ("adapter_damaged", 1, False),
        ("bad_request", 0, False),
        ("context_length", 0, False),
    ],
)
def test_a_refusal_that_another_engine_may_not_give_interrupts(code: str, tokens: int, migrates: bool) -> None:
    here = Table("a")
    here.table.on_batch(batch(TokenDelta("a", 0, tuple(range(tokens)))), 0.0)
    here.table.on_failed(Failed(request_id="a", engine="engine-0", code=code, message="why"))
    assert here.streams["a"].state is (StreamState.INTERRUPTED if migrates else StreamState.FAILED)


def test_an_engine_that_ended_before_the_router_s_answer_interrupts_its_stream_at_once() -> None:
    here = Table("a", route=False)
    here.table.on_engine_gone(EngineGone(engine="engine-0", incarnation=INCARNATION, ended=True))
    assert here.table.set_engine(here.streams["a"], "engine-0", INCARNATION, 0.1) == set()
    assert interruption(here.streams["a"]).code == "engine_died"
    other = here.table.open("b", 0, here.wake)
    here.table.set_engine(other, "engine-0", "b" * 16, 0.1)
    assert other.state is StreamState.RUNNING


def test_engines_that_sent_nothing_lately_are_quiet_until_they_answer() -> None:
    here = Table("a", "b")
    assert here.table.quiet_engines(QUIET_S - 0.1) == []
    assert here.table.quiet_engines(QUIET_S) == [("engine-0", INCARNATION)]
    here.table.on_batch(batch(TokenDelta(request_id="a", index=0, tokens=(1,))), 1.0)
    assert here.table.quiet_engines(1.1) == []
    here.table.watch.note_heard("engine-0", INCARNATION, 2.0)
    assert here.table.quiet_engines(2.1) == []
    here.table.watch.note_heard("engine-0", "b" * 16, 3.0)
    assert here.table.quiet_engines(3.0) == [("engine-0", INCARNATION)], "another incarnation answered"


def test_a_new_stream_does_not_hide_that_its_engine_is_quiet() -> None:
    here = Table("a")
    stream = here.table.open("b", 0, here.wake)
    stream.set_engine("engine-0", INCARNATION, 5.0)
    assert here.table.quiet_engines(5.1) == [("engine-0", INCARNATION)]


def test_streams_are_interrupted_if_their_engine_does_not_answer_unless_it_sent_tokens_meanwhile() -> None:
    here = Table("a", "b")
    here.table.on_batch(batch(TokenDelta(request_id="a", index=0, tokens=(1,))), 2.0)
    here.table.on_no_answer("engine-0", INCARNATION, asked_s=1.5)
    here.table.on_no_answer("engine-0", "b" * 16, asked_s=3.0)
    assert all(stream.state is StreamState.RUNNING for stream in here.streams.values())
    here.table.on_no_answer("engine-0", INCARNATION, asked_s=3.0)
    assert "it does not answer this gateway" in interruption(here.streams["a"]).message


def test_streams_of_an_engine_whose_next_incarnation_answers_are_interrupted() -> None:
    here = Table("a")
    here.table.on_restarted("engine-0", INCARNATION)
    assert "it was restarted" in interruption(here.streams["a"]).message
