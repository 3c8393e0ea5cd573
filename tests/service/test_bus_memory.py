"""Tests of the in-memory network alone: injected faults and virtual time."""

import asyncio
import time
from typing import Any

import pytest

from loraserve.bus import wire
from loraserve.bus.endpoint import AFTER_PAUSE_S, LATE_TIMER_S
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.messages import PROTOCOL_VERSION, Ping, Pong
from loraserve.testing.clock import DeadlockError, run_virtual
from loraserve.testing.memory_bus import Fault, MemoryBus, MemoryNetwork

PONG = Pong(name="b", state="READY", incarnation="", pid=1, protocol=PROTOCOL_VERSION)


def pong(pid: int) -> Pong:
    return Pong(name="b", state="READY", incarnation="", pid=pid, protocol=PROTOCOL_VERSION)


async def pids(bus: MemoryBus, count: int) -> list[int]:
    return [(await bus.receive()).message.pid for _ in range(count)]


def test_only_the_messages_that_a_fault_drops_are_lost() -> None:
    async def scenario() -> None:
        def lose_odd(sender: str, receiver: str, message: Any) -> Fault | None:
            return Fault(copies=0) if message.pid % 2 else None

        network = MemoryNetwork(lose_odd)
        a, b = network.bus("a", Pong), network.bus("b", Pong)
        assert all(a.send("b", pong(n)) for n in range(10))
        assert await pids(b, 5) == [0, 2, 4, 6, 8]

    asyncio.run(scenario())


def test_a_request_times_out_if_its_answer_is_lost() -> None:
    async def scenario() -> None:
        network = MemoryNetwork(lambda sender, _, message: Fault(copies=0) if isinstance(message, Pong) else None)
        a, b = network.bus("a", Ping), network.bus("b", Ping)
        ask = asyncio.create_task(a.request("b", Ping(), Pong, 30))
        b.respond(await b.receive(), PONG)
        with pytest.raises(RequestTimeoutError):
            await ask
        assert asyncio.get_running_loop().time() == pytest.approx(30)

    run_virtual(scenario())


def test_the_requester_gets_one_answer_to_a_doubled_request() -> None:
    async def scenario() -> None:
        network = MemoryNetwork(lambda *_: Fault(copies=2))
        a, b = network.bus("a", Ping), network.bus("b", Ping)
        ask = asyncio.create_task(a.request("b", Ping(), Pong, 30))
        for n in range(2):
            b.respond(await b.receive(), pong(n))
        assert (await ask).pid == 0
        assert a.counters.late_replies == 3

    run_virtual(scenario())


def test_a_delayed_message_delays_later_messages_of_its_sender() -> None:
    async def scenario() -> None:
        network = MemoryNetwork(lambda _, __, message: Fault(delay_s=5.0) if message.pid == 1 else None)
        a, b, c = network.bus("a", Pong), network.bus("b", Pong), network.bus("c", Pong)
        for n in range(4):
            a.send("b", pong(n))
        c.send("b", pong(9))
        assert await pids(b, 2) == [0, 9]
        assert asyncio.get_running_loop().time() == 0
        assert await pids(b, 3) == [1, 2, 3]
        assert asyncio.get_running_loop().time() == pytest.approx(5, abs=1e-3)
        await asyncio.sleep(1)
        a.send("b", pong(4))
        assert await pids(b, 1) == [4]

    run_virtual(scenario())


def test_another_protocol_version_is_refused_as_over_sockets() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        a, b = network.bus("a", Ping), network.bus("b", Ping)
        future = wire.encode_hello("a", a.incarnation, PROTOCOL_VERSION + 1)
        b.arrive(future, wire.pack_message(wire.SEND, wire.NO_CORRELATION, Ping()))
        assert b.counters.bad == {("a", "protocol_mismatch"): 1}
        assert b.arrived_messages == 0

    asyncio.run(scenario())


def test_the_receiver_does_not_see_later_changes_of_a_sent_buffer() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        a, b = network.bus("a", Ping), network.bus("b", Ping)
        buffer = bytearray(b"before")
        a.send("b", Ping(), [buffer])
        buffer[:] = b"after!"
        assert (await b.receive()).frames == (b"before",)

    asyncio.run(scenario())


def test_killing_a_process_ends_both_directions_and_frees_its_name() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        a, b = network.bus("a", Ping), network.bus("b", Ping, incarnation="00000000000000b1")
        b.subscribe("a", "news")
        network.kill("b")
        assert not b.send("a", Ping())
        with pytest.raises(RequestTimeoutError, match="closed"):
            await b.request("a", Ping(), Pong, 1)
        a.publish("news", Ping())
        again = network.bus("b", Ping)
        a.send("b", Ping())
        assert (await again.receive()).topic == ""
        assert again.incarnation != "00000000000000b1"

    run_virtual(scenario())


def test_a_refusal_with_non_ascii_text_arrives_unchanged() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        a, b = network.bus("a", Ping), network.bus("b", Ping)
        ask = asyncio.create_task(a.request("b", Ping(), Pong, 30))
        b.refuse(await b.receive(), "überlastet", "später")
        with pytest.raises(PeerError, match="überlastet: später"):
            await ask

    run_virtual(scenario())


def test_waiting_for_a_message_that_is_never_sent_raises_deadlock_error() -> None:
    async def scenario() -> None:
        await MemoryNetwork().bus("a", Ping).receive()

    with pytest.raises(DeadlockError):
        run_virtual(scenario())


def test_a_request_whose_process_was_paused_past_its_timeout_waits_for_the_answer() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        asker, peer = network.bus("asker", None), network.bus("peer", Ping)
        asking = asyncio.ensure_future(asker.request("peer", Ping(), Pong, 0.1))
        question = await peer.receive()
        time.sleep(0.1 + 2 * LATE_TIMER_S)  # noqa: ASYNC251
        # The sockets are read some time after the pause.
        await asyncio.sleep(0.05)
        peer.respond(question, PONG)
        assert await asking == PONG

    asyncio.run(scenario())


def test_a_request_times_out_although_the_event_loop_is_always_slow() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        asker = network.bus("asker", None)
        network.bus("peer", Ping)
        asking = asyncio.ensure_future(asker.request("peer", Ping(), Pong, 0.1))
        for _ in range(8):
            await asyncio.sleep(0)
            if not asking.done():
                time.sleep(AFTER_PAUSE_S + 2 * LATE_TIMER_S)  # noqa: ASYNC251
        assert asking.done()
        with pytest.raises(RequestTimeoutError):
            await asking

    asyncio.run(scenario())
