"""Dead peers, failed connections and cancelled reads leave no RDMA resources behind."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from loraserve.bus.protocol import Envelope
from loraserve.bus.zmq import open_bus
from loraserve.config import Config
from loraserve.errors import ConfigError
from loraserve.messages import ConnectQueue
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION
from loraserve.testing.memory_bus import MemoryNetwork
from loraserve.testing.memory_owner import pattern
from loraserve.testing.verbs_owner import VerbsOwner
from loraserve.transfer.protocol import ByteRange, TransferError
from loraserve.transfer.verbs.device import RdmaDevice
from loraserve.transfer.verbs.exporter import VerbsExporter
from loraserve.transfer.verbs.queue import Completions, QueuePair
from loraserve.transfer.verbs.reader import VerbsReader

TIMEOUT_S = 5.0
HANGS_S = 60.0
ONE = [ByteRange(0, 1)]
Scenario = Callable[[VerbsReader], Awaitable[None]]


def resource_counts() -> dict[str, int]:
    """Return the kernel's counts of queue pairs, completion queues and memory regions of all processes."""
    tool = shutil.which("rdma")
    if tool is None:
        pytest.skip("iproute2's `rdma` is needed to count RDMA resources")
    counted = json.loads(subprocess.check_output([tool, "-j", "resource", "show"]))
    return {kind: sum(device.get(kind, 0) for device in counted) for kind in ("qp", "cq", "mr", "pd")}


def play(config: Config, scenario: Scenario) -> str:
    """Run the scenario with a new reader. Return the incarnation of the reader's bus."""

    async def main() -> str:
        bus, device = open_bus(config, "reader", None), RdmaDevice()
        reader = VerbsReader(bus, device, TIMEOUT_S)
        try:
            async with asyncio.timeout(HANGS_S):
                await scenario(reader)
        finally:
            reader.close()
            device.close()
            await bus.close()
        return bus.incarnation

    return asyncio.run(main())


def reads_from(owner: VerbsOwner) -> Scenario:
    return lambda reader: reader.read(owner.handle, ONE, memoryview(bytearray(1)))


async def read_forever(reader: VerbsReader, owner: VerbsOwner, into: NDArray[np.uint8]) -> None:
    while True:
        await reader.read(owner.handle, [ByteRange(0, len(into))], into.data)


def test_a_restarted_reader_replaces_its_old_connection(owner: VerbsOwner, config: Config) -> None:
    incarnations = [play(config, reads_from(owner)) for _ in range(3)]
    assert owner.serving() == 1

    async def scenario(reader: VerbsReader) -> None:
        await reads_from(owner)(reader)
        # The old incarnation's death may be announced after the new one has connected.
        owner.forget("reader", incarnations[-1])
        assert owner.serving() == 1
        await reads_from(owner)(reader)

    last = play(config, scenario)
    owner.forget("reader", last)
    assert owner.serving() == 0


def test_a_restarted_owner_replaces_its_old_connection(config: Config) -> None:
    async def scenario(reader: VerbsReader) -> None:
        for _ in range(3):
            # The reader does not notice the death, because no read is in progress.
            with VerbsOwner(pattern(4096), config, "mortal") as mortal:
                await reads_from(mortal)(reader)
            assert reader.connected == 1

    play(config, scenario)


def test_reads_from_an_owner_that_is_forgotten_fail_at_once(owner: VerbsOwner, config: Config) -> None:
    async def scenario(reader: VerbsReader) -> None:
        into = np.zeros(owner.handle.length_bytes, np.uint8)
        reader.keep(into.data)
        reads = [asyncio.create_task(read_forever(reader, owner, into)) for _ in range(4)]
        while not into[0]:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        reader.forget("mortal", owner.handle.incarnation)
        reader.forget(owner.handle.owner, "another")
        assert reader.connected == 1
        while not any(read.done() for read in reads):
            # All reads may have finished just before. Their successors connect again.
            reader.forget(owner.handle.owner, owner.handle.incarnation)
            assert reader.connected == 0
            await asyncio.sleep(0.005)
        failed = [read for read in reads if read.done()]
        with pytest.raises(TransferError, match="the owner died") as gone:
            await failed.pop()
        assert gone.value.code == "gone"
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
        await reads_from(owner)(reader)
        before = resource_counts()
        reader.forget(owner.handle.owner, owner.handle.incarnation)
        assert resource_counts() == {**before, "qp": before["qp"] - 1}

    play(config, scenario)


def test_no_connection_is_made_for_a_peer_forgotten_meanwhile() -> None:
    before = resource_counts()

    async def main() -> None:
        network = MemoryNetwork()
        bus, device = network.bus("owner", ConnectQueue), RdmaDevice()
        exporter = VerbsExporter(bus, device)
        handle = exporter.register(pattern(4096).data)
        completions = Completions(device, 1)
        end = QueuePair(device, completions, 1, served=False).end

        async def connect_during(event: Callable[[], object], link: str = "a", life: str = "2") -> int:
            asked = ConnectQueue(
                protocol=TRANSFER_PROTOCOL_VERSION,
                incarnation=handle.incarnation,
                link=link,
                reader_incarnation=life,
                end=end,
            )
            answer = asyncio.create_task(exporter.answer(Envelope("reader", asked)))
            await asyncio.sleep(0)
            event()
            await asyncio.gather(answer, return_exceptions=True)
            return exporter.serving

        one_more = {"qp": resource_counts()["qp"] + 1}
        assert await connect_during(lambda: exporter.forget("reader")) == 0
        assert await connect_during(lambda: exporter.forget("reader", "2")) == 0
        assert await connect_during(lambda: exporter.forget("other")) == 1
        assert await connect_during(lambda: exporter.forget("reader", "1"), "b") == 2
        assert await connect_during(lambda: None, "b") == 2
        exporter.forget("reader")
        assert await connect_during(lambda: None) == 1
        assert resource_counts()["qp"] == one_more["qp"]
        assert await connect_during(exporter.close) == 0
        completions.close()
        device.close()

    asyncio.run(main())
    assert resource_counts() == before


def test_cancelled_reads_leave_nothing_registered(owner: VerbsOwner, config: Config) -> None:
    async def scenario(reader: VerbsReader) -> None:
        await reads_from(owner)(reader)
        before = resource_counts()
        into = np.zeros(owner.handle.length_bytes, np.uint8)
        for begun in range(8):
            read = asyncio.create_task(read_forever(reader, owner, into))
            for _ in range(begun):
                await asyncio.sleep(0.002)
            for _ in range(3):
                read.cancel()
                await asyncio.sleep(0)
            await asyncio.wait([read])
            assert read.cancelled()
            assert resource_counts() == before

    play(config, scenario)


def test_a_completion_queue_that_is_too_large_is_a_clear_error() -> None:
    before = resource_counts()
    device = RdmaDevice()
    with pytest.raises(ConfigError, match="no room for"):
        Completions(device, 1 << 30)
    device.close()
    assert resource_counts() == before
