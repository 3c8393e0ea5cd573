"""A broken connection ignores the completions of its former reads."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, VerbsHandle
from loraserve.transfer.protocol import ByteRange, TransferError
from loraserve.transfer.verbs.link import InterruptedReadError, ReadConnection, ReadDestination
from loraserve.transfer.verbs.plan import FLUSHED

HANDLE = VerbsHandle(
    protocol=TRANSFER_PROTOCOL_VERSION, owner="engine-0", incarnation="1", length_bytes=1 << 20, base=1 << 30, key=7
)
DEPTH = 2
DENIED = 10


class FakeQueue:
    """A queue pair that records requests. Nothing completes unless the test says so."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.closed = False

    def read(self, number: int, to: int, local_key: int, source: int, remote_key: int, length_bytes: int) -> None:
        assert not self.closed, "a queue pair that is closed was asked"
        self.asked.append(number)

    def close(self) -> None:
        self.closed = True


def play(scenario: Callable[[ReadConnection, FakeQueue], Awaitable[None]]) -> None:
    queue = FakeQueue()
    # What a Link uses of a QueuePair is these two.
    asyncio.run(scenario(ReadConnection(queue, DEPTH, number=1), queue))  # type: ignore[arg-type, func-returns-value]


def begin(link: ReadConnection, timeout_s: float = 60.0) -> "asyncio.Task[None]":
    """A read of four pieces, of which at most two are in flight."""
    return asyncio.create_task(link.read(HANDLE, [ByteRange(0, 4096)], ReadDestination(0, 1), 1024, timeout_s))


@pytest.mark.parametrize("status", [0, DENIED, FLUSHED])
def test_completions_of_a_timed_out_connection_are_ignored(status: int) -> None:
    async def scenario(link: ReadConnection, queue: FakeQueue) -> None:
        with pytest.raises(TransferError, match="nothing arrived for"):
            await begin(link, timeout_s=0.01)
        assert queue.closed
        for number in queue.asked:
            link.arrived(number, status)
        assert len(queue.asked) == DEPTH

    play(scenario)


def test_only_reads_interrupted_by_another_read_may_be_retried() -> None:
    async def scenario(link: ReadConnection, queue: FakeQueue) -> None:
        guilty, other = begin(link), begin(link)
        await asyncio.sleep(0)
        link.arrived(queue.asked[0], DENIED)
        link.arrived(queue.asked[1], DENIED)
        failed = await asyncio.gather(guilty, other, return_exceptions=True)
        assert [type(each) for each in failed] == [TransferError, InterruptedReadError]

    play(scenario)


def test_an_owner_that_is_gone_is_not_asked_again() -> None:
    async def scenario(link: ReadConnection, queue: FakeQueue) -> None:
        read = begin(link)
        await asyncio.sleep(0)
        link.give_up()
        assert queue.closed
        with pytest.raises(TransferError, match="the owner died") as failed:
            await read
        assert (type(failed.value), failed.value.code) == (TransferError, "gone")

    play(scenario)
