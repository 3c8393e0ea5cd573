"""Announcement of verbs, and clear errors of owner or device for impossible connections and memory."""

import asyncio

import msgspec
import pytest

from loraserve.bus.zmq import open_bus
from loraserve.config import Config
from loraserve.errors import ConfigError, PeerError
from loraserve.messages import ConnectQueue, QueueConnected, QueueEnd
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION
from loraserve.testing.verbs_owner import VerbsOwner
from loraserve.transfer.abilities import local_abilities
from loraserve.transfer.cuda_driver import GpuMemory
from loraserve.transfer.verbs.device import RdmaDevice

MIB = 1 << 20
TIMEOUT_S = 5.0


def test_this_machine_offers_verbs() -> None:
    assert local_abilities(("verbs", "tcp"), "cpu").transports == ("verbs", "tcp")


def test_a_connection_that_cannot_be_is_refused(owner: VerbsOwner, config: Config) -> None:
    end = QueueEnd(number=17, first_packet=1, gid="::1", lid=0, mtu=5, link_layer="Ethernet", reads=1)
    good = ConnectQueue(
        protocol=TRANSFER_PROTOCOL_VERSION,
        incarnation=owner.handle.incarnation,
        link="mine",
        reader_incarnation="1",
        end=end,
    )
    cases: list[tuple[dict[str, object], dict[str, object], str]] = [
        ({"protocol": TRANSFER_PROTOCOL_VERSION + 1}, {}, "version"),
        ({"incarnation": "another"}, {}, "gone"),
        ({}, {"link_layer": "InfiniBand"}, "refused"),
        ({}, {"gid": "nonsense"}, "refused"),
        ({}, {"mtu": 0}, "refused"),
        ({}, {"reads": 1 << 40}, "refused"),
        ({}, {"number": 1 << 40}, "refused"),
        ({}, {"first_packet": -1}, "refused"),
    ]

    async def main() -> None:
        bus = open_bus(config, "reader", None)
        for request, changes, code in cases:
            asked = msgspec.structs.replace(good, **request, end=msgspec.structs.replace(end, **changes))
            with pytest.raises(PeerError) as refused:
                await bus.request(owner.handle.owner, asked, QueueConnected, TIMEOUT_S)
            assert refused.value.code == code, (request, changes)
        await bus.close()

    asyncio.run(main())
    assert owner.serving() == 0


def test_memory_that_cannot_be_registered_is_a_clear_error() -> None:
    device = RdmaDevice()
    with pytest.raises(ConfigError, match=r"GPU memory cannot be registered.*nvidia-peermem"):
        device.readable(GpuMemory(1 << 30, MIB))
    device.close()
    with pytest.raises(ConfigError, match="'none-such' is up"):
        RdmaDevice("none-such")
