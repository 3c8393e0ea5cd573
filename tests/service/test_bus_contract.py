"""The contract of the bus. Every test runs over each transport."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from loraserve.bus.protocol import Bus, Frame
from loraserve.bus.zmq import open_bus
from loraserve.config import BusConfig, ClusterConfig, Config
from loraserve.errors import ConfigError, LoraServeError, PeerError, RequestTimeoutError
from loraserve.testing.memory_bus import MemoryNetwork

TIMEOUT_S = 10.0
QUEUE_MESSAGES = 2000


class Note(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    number: int


class Ask(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    number: int


class Told(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    number: int


class Unheard(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A message that no inbox of these tests accepts."""

    number: int = 0


class MistypedNote(msgspec.Struct, frozen=True, tag="Note", kw_only=True):
    number: str


INBOX = Note | Ask


class Cluster:
    """Starts and ends buses of one transport. Peers cannot tell ``end`` from the death of the process."""

    def __init__(self, transport: str, run_dir: Path) -> None:
        self._network = MemoryNetwork(queue_messages=QUEUE_MESSAGES) if transport == "memory" else None
        self._run_dir = run_dir
        self._buses: list[Bus] = []

    def bus(self, name: str) -> Bus:
        bus = self._network.bus(name, INBOX) if self._network else open_bus(self._config(), name, INBOX)
        self._buses.append(bus)
        return bus

    async def end(self, bus: Bus) -> None:
        await bus.close()

    async def end_all(self) -> None:
        for bus in self._buses:
            await bus.close()

    def _config(self) -> Config:
        return Config(cluster=ClusterConfig(run_dir=str(self._run_dir)), bus=BusConfig(queue_messages=QUEUE_MESSAGES))


Scenario = Callable[[Cluster], Awaitable[None]]


@pytest.fixture
def short_dir() -> Iterator[Path]:
    # Socket paths are limited to about a hundred bytes, and pytest's folders have longer paths on some machines.
    with tempfile.TemporaryDirectory(prefix="ls-") as folder:
        yield Path(folder) / "run"


@pytest.fixture(params=["memory", "zmq"])
def run(request: pytest.FixtureRequest, short_dir: Path) -> Callable[[Scenario], None]:
    async def play(scenario: Scenario) -> None:
        cluster = Cluster(request.param, short_dir)
        try:
            async with asyncio.timeout(2 * TIMEOUT_S):
                await scenario(cluster)
        finally:
            await cluster.end_all()

    return lambda scenario: asyncio.run(play(scenario))


async def answering(bus: Bus) -> None:
    """Answer each Ask with its number and its frames."""
    while True:
        envelope = await bus.receive()
        if isinstance(envelope.message, Ask):
            bus.respond(envelope, Told(number=envelope.message.number), envelope.frames)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def numbers(bus: Bus, count: int) -> list[int]:
    return [(await bus.receive()).message.number for _ in range(count)]


def test_messages_arrive_in_order_with_their_sender(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a, b = cluster.bus("a"), cluster.bus("b")
        assert all(a.send("b", Note(number=n)) for n in range(500))
        assert await numbers(b, 500) == list(range(500))
        b.send("b", Note(number=7), [b"own"])
        own = await b.receive()
        assert (own.sender, own.message, own.frames, own.reply_to) == ("b", Note(number=7), (b"own",), ())

    run(scenario)


def test_requests_and_answers_carry_frames(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a, b = cluster.bus("a"), cluster.bus("b")
        server = asyncio.create_task(answering(b))
        large = bytes(range(256)) * 8192
        view = memoryview(large)
        cases: list[list[Frame]] = [[], [b""], [b"x", bytearray(b"yy"), view], [view[5:70_000]]]
        for frames in cases:
            told, back = await a.request_frames("b", Ask(number=3), Told, TIMEOUT_S, frames)
            assert told == Told(number=3)
            assert [bytes(frame) for frame in back] == [bytes(frame) for frame in frames]
        server.cancel()

    run(scenario)


def test_answers_in_any_order_reach_their_requests(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a, b = cluster.bus("a"), cluster.bus("b")
        asks = [asyncio.create_task(a.request("b", Ask(number=n), Told, TIMEOUT_S)) for n in range(50)]
        for envelope in reversed([await b.receive() for _ in asks]):
            b.respond(envelope, Told(number=envelope.message.number))
        assert [(await ask).number for ask in asks] == list(range(50))

    run(scenario)


def test_a_union_may_be_the_answer_type(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a, b = cluster.bus("a"), cluster.bus("b")
        reader = asyncio.create_task(b.receive())
        reader.add_done_callback(lambda done: b.respond(done.result(), Note(number=2)))
        answer: Told | Note = await a.request("b", Ask(number=1), Told | Note, TIMEOUT_S)
        assert answer == Note(number=2)

    run(scenario)


def test_refused_request_raises_peer_error(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a, b = cluster.bus("a"), cluster.bus("b")
        ask = asyncio.create_task(a.request("b", Ask(number=1), Told, TIMEOUT_S))
        b.refuse(await b.receive(), "not_found", "no such thing")
        with pytest.raises(PeerError) as refused:
            await ask
        assert (refused.value.code, refused.value.message) == ("not_found", "no such thing")

    run(scenario)


def test_answering_a_one_way_message_does_nothing(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a, b = cluster.bus("a"), cluster.bus("b")
        a.send("b", Note(number=1))
        envelope = await b.receive()
        b.respond(envelope, Told(number=1))
        b.refuse(envelope, "code", "text")
        assert b.counters.sent == 0

    run(scenario)


def test_a_request_times_out_and_its_late_answer_is_dropped(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a, b = cluster.bus("a"), cluster.bus("b")
        with pytest.raises(RequestTimeoutError, match=r"b did not answer Ask in 0.2 s"):
            await a.request("b", Ask(number=1), Told, 0.2)
        late = await b.receive()
        b.respond(late, Told(number=1))
        b.respond(late, Told(number=1))
        await until(lambda: a.counters.late_replies == 2)
        again = asyncio.create_task(a.request("b", Ask(number=2), Told, TIMEOUT_S))
        b.respond(await b.receive(), Told(number=2))
        assert await again == Told(number=2)

    run(scenario)


def test_a_message_with_an_unknown_tag_is_counted_dropped_and_refused(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a, b = cluster.bus("a"), cluster.bus("b")
        a.send("b", Unheard())
        a.send("b", Note(number=1))
        assert await numbers(b, 1) == [1]
        assert b.counters.bad == {("a", "bad_message"): 1}
        reader = asyncio.create_task(b.receive())
        with pytest.raises(PeerError, match="Invalid value 'Unheard'") as refused:
            await a.request("b", Unheard(), Told, TIMEOUT_S)
        assert refused.value.code == "bad_message"
        reader.cancel()

    run(scenario)


def test_a_field_of_a_wrong_type_is_refused_with_its_path(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a, b = cluster.bus("a"), cluster.bus("b")
        reader = asyncio.create_task(b.receive())
        with pytest.raises(PeerError, match=r"Expected `int`, got `str` - at `\$\.number`"):
            await a.request("b", MistypedNote(number="1"), Told, TIMEOUT_S)
        reader.cancel()

    run(scenario)


def test_the_requester_refuses_an_answer_of_another_type(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a, b = cluster.bus("a"), cluster.bus("b")
        ask = asyncio.create_task(a.request("b", Ask(number=1), Told, TIMEOUT_S))
        b.respond(await b.receive(), Unheard())
        with pytest.raises(PeerError) as refused:
            await ask
        assert refused.value.code == "bad_reply"
        assert a.counters.bad == {("b", "bad_reply"): 1}

    run(scenario)


def test_messages_wait_for_a_peer_that_has_not_started(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a = cluster.bus("a")
        for n in range(20):
            a.send("b", Note(number=n))
        ask = asyncio.create_task(a.request("b", Ask(number=20), Told, TIMEOUT_S))
        await asyncio.sleep(0.1)
        b = cluster.bus("b")
        assert await numbers(b, 20) == list(range(20))
        b.respond(await b.receive(), Told(number=20))
        assert await ask == Told(number=20)

    run(scenario)


def test_a_request_that_timed_out_is_not_delivered_later(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a = cluster.bus("a")
        with pytest.raises(RequestTimeoutError):
            await a.request("b", Ask(number=1), Told, 0.05)
        cancelled = asyncio.create_task(a.request("b", Ask(number=2), Told, TIMEOUT_S))
        await asyncio.sleep(0.05)
        cancelled.cancel()
        await asyncio.sleep(0)
        a.send("b", Note(number=3))
        assert await numbers(cluster.bus("b"), 1) == [3]

    run(scenario)


def test_a_full_queue_refuses_further_messages_and_keeps_earlier_ones(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a = cluster.bus("a")
        taken = [a.send("b", Note(number=n)) for n in range(QUEUE_MESSAGES + 3)]
        assert taken == [True] * QUEUE_MESSAGES + [False] * 3
        with pytest.raises(RequestTimeoutError, match="queue for it is full"):
            await a.request("b", Ask(number=1), Told, TIMEOUT_S)
        assert a.counters.dropped == {"b": 4}
        b = cluster.bus("b")
        assert await numbers(b, QUEUE_MESSAGES) == list(range(QUEUE_MESSAGES))

    run(scenario)


def test_a_slow_peer_fills_its_own_queue_and_delays_no_other_peer(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a, b, c = cluster.bus("a"), cluster.bus("b"), cluster.bus("c")
        sent = 0
        while a.send("b", Note(number=sent)):
            sent += 1
            await asyncio.sleep(0)
            assert sent < 100_000, "nothing bounds the queue"
        assert sent >= QUEUE_MESSAGES
        assert a.send("c", Note(number=1))
        assert await numbers(c, 1) == [1]
        assert await numbers(b, sent) == list(range(sent))

    run(scenario)


def test_requests_to_a_peer_that_dies_fail_at_once(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a, b = cluster.bus("a"), cluster.bus("b")
        ask = asyncio.create_task(a.request("b", Ask(number=1), Told, 60))
        await b.receive()
        started_s = asyncio.get_running_loop().time()
        await cluster.end(b)
        with pytest.raises(RequestTimeoutError, match="connection was lost"):
            await ask
        assert asyncio.get_running_loop().time() - started_s < 5

    run(scenario)


def test_a_lost_connection_is_reported_at_once_each_time(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        asker, peer = cluster.bus("asker"), cluster.bus("peer")
        lost: list[str] = []
        asker.watch_connection("peer", lambda: lost.append("peer"))
        for times in (1, 2):
            answer = asyncio.create_task(answering(peer))
            await asker.request("peer", Ask(number=times), Told, TIMEOUT_S)
            answer.cancel()
            assert len(lost) == times - 1
            await cluster.end(peer)
            await until(lambda times=times: len(lost) == times)  # type: ignore[misc]
            peer = cluster.bus("peer")

    run(scenario)


def test_only_a_process_that_ended_refuses_connections(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        asker, peer = cluster.bus("asker"), cluster.bus("peer")
        assert not await asker.refuses_connections("peer", TIMEOUT_S)
        await cluster.end(peer)
        assert await asker.refuses_connections("peer", TIMEOUT_S)
        assert not await cluster.bus("peer").refuses_connections("asker", TIMEOUT_S)

    run(scenario)


def test_a_restarted_peer_receives_later_messages_once_each(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a, b = cluster.bus("a"), cluster.bus("b")
        past = b.incarnation
        a.send("b", Note(number=0))
        assert await numbers(b, 1) == [0]
        await cluster.end(b)
        await asyncio.sleep(0.05)
        b = cluster.bus("b")
        assert b.incarnation != past
        for n in range(1, 200):
            a.send("b", Note(number=n))
            await asyncio.sleep(0)
        assert await numbers(b, 199) == list(range(1, 200))
        ask = asyncio.create_task(a.request("b", Ask(number=5), Told, TIMEOUT_S))
        b.respond(await b.receive(), Told(number=5))
        assert await ask == Told(number=5)

    run(scenario)


def test_an_answer_to_a_restarted_requester_is_dropped(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a, b = cluster.bus("a"), cluster.bus("b")
        ask = asyncio.create_task(a.request("b", Ask(number=1), Told, TIMEOUT_S))
        question = await b.receive()
        await cluster.end(a)
        with pytest.raises(RequestTimeoutError, match="closed"):
            await ask
        a = cluster.bus("a")
        a.send("b", Note(number=1))
        await b.receive()
        b.respond(question, Told(number=1))
        b.send("a", Note(number=2))
        assert await numbers(a, 1) == [2]
        assert b.counters.dropped == {"a": 1}
        assert a.counters.late_replies == 0

    run(scenario)


async def publish_until_received(publisher: Bus, subscriber: Bus, topic: str, number: int) -> list[int]:
    """Publish a number repeatedly until the subscriber receives it, and return all numbers received until then.

    A subscriber misses publications from before its subscription took effect.
    """
    got: list[int] = []
    while number not in got:
        publisher.publish(topic, Note(number=number))
        try:
            async with asyncio.timeout(0.05):
                envelope = await subscriber.receive()
        except TimeoutError:
            continue
        assert (envelope.sender, envelope.topic, envelope.reply_to) == (publisher.name, topic, ())
        got.append(envelope.message.number)
    return got


def test_publications_reach_those_who_subscribed_before_the_publisher_started(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a, c = cluster.bus("a"), cluster.bus("c")
        for subscriber in (a, c):
            subscriber.subscribe("b", "load")
        b = cluster.bus("b")
        assert (await publish_until_received(b, a, "load", 1))[-1] == 1
        assert (await publish_until_received(b, c, "load", 2))[-1] == 2
        await cluster.end(b)
        b = cluster.bus("b")
        assert (await publish_until_received(b, a, "load", 3))[-1] == 3

    run(scenario)


def test_a_subscriber_receives_only_its_topics(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a, b = cluster.bus("a"), cluster.bus("b")
        a.subscribe("b", "load")
        a.subscribe("b", "load")
        await publish_until_received(b, a, "load", 1)
        b.publish("loads", Note(number=2))
        b.publish("plan", Note(number=3))
        b.publish("load", Unheard())
        assert set(await publish_until_received(b, a, "load", 4)) <= {1, 4}
        assert a.counters.bad == {("b", "bad_message"): 1}
        a.subscribe("b", "plan")
        assert set(await publish_until_received(b, a, "plan", 5)) == {5}

    run(scenario)


def test_forgetting_a_peer_drops_the_messages_queued_for_it(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a = cluster.bus("a")
        a.send("b", Note(number=1))
        ask = asyncio.create_task(a.request("b", Ask(number=2), Told, 60))
        await asyncio.sleep(0)
        a.forget("b")
        a.forget("never-known")
        with pytest.raises(RequestTimeoutError, match="given up"):
            await ask
        a.send("b", Note(number=3))
        assert await numbers(cluster.bus("b"), 1) == [3]

    run(scenario)


def test_closing_a_bus_ends_all_waits(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a = cluster.bus("a")
        ask = asyncio.create_task(a.request("b", Ask(number=1), Told, 60))
        reader = asyncio.create_task(a.receive())
        await asyncio.sleep(0.01)
        await a.close()
        await a.close()
        for task in (ask, reader):
            with pytest.raises(LoraServeError, match="closed"):
                await task
        assert not a.send("b", Note(number=1))
        with pytest.raises(RequestTimeoutError, match="closed"):
            await a.request("b", Ask(number=1), Told, 60)

    run(scenario)


def test_two_live_processes_cannot_have_the_same_name(run: Callable[[Scenario], None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        a = cluster.bus("a")
        with pytest.raises(ConfigError, match="a process named a already runs"):
            cluster.bus("a")
        a.send("a", Note(number=1))
        assert await numbers(a, 1) == [1]
        with pytest.raises(ConfigError, match="process name 'A b'"):
            cluster.bus("A b")

    run(scenario)
