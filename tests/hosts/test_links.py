"""The bus between two hosts whose network fails."""

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator

import pytest

from loraserve.benchmarks.hosts.network import CUT, VirtualNetwork
from loraserve.bus.protocol import Bus
from loraserve.bus.zmq import open_bus
from loraserve.config import BusConfig, ClusterConfig, Config
from loraserve.messages import Ping, Pong

PONG = Pong(name="b", state="READY", incarnation="0" * 16, pid=1, protocol=1)
TIMEOUT_S = 30.0
ABSENT_S = 20.0
"""The kernel alone would then wait ten seconds or more until its next attempt to connect."""
AGAIN_WITHIN_S = 4.0


@pytest.fixture
def network() -> Iterator[VirtualNetwork]:
    with VirtualNetwork(("a", "b")) as network:
        yield network


def config_of(network: VirtualNetwork, run_dir: str) -> Config:
    peers = {name: f"tcp://{host.address}:5570,tcp://{host.address}:5571" for name, host in network.hosts.items()}
    return Config(bus=BusConfig(peers=peers), cluster=ClusterConfig(run_dir=run_dir))


def open_on(network: VirtualNetwork, config: Config, name: str) -> Bus:
    """Open a bus on the host of its name. Its threads keep the network in which they start."""
    with network.hosts[name].entered():
        return open_bus(config, name, Ping)


async def answer_pings(bus: Bus) -> None:
    while True:
        bus.respond(await bus.receive(), PONG)


def test_a_peer_is_found_soon_after_a_long_failure_of_the_network(
    network: VirtualNetwork, measured: Callable[[str], None]
) -> None:
    async def scenario(config: Config) -> None:
        a, b = open_on(network, config, "a"), open_on(network, config, "b")
        server = asyncio.create_task(answer_pings(b))
        network.set_rules_between(["a"], ["b"], CUT)
        asking = asyncio.create_task(a.request("b", Ping(), Pong, 2 * TIMEOUT_S))
        await asyncio.sleep(ABSENT_S)
        network.heal()
        healed_s = time.monotonic()
        assert await asking == PONG
        found_s = time.monotonic() - healed_s
        measured(f"a peer is found {found_s:.1f} s after a network failure of {ABSENT_S:.0f} s")
        assert found_s < AGAIN_WITHIN_S
        server.cancel()
        await a.close()
        await b.close()

    with tempfile.TemporaryDirectory(prefix="ls-") as folder:
        asyncio.run(scenario(config_of(network, folder)))
