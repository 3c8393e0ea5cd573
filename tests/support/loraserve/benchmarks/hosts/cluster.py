"""A cluster of real processes on several virtual hosts, with a tiny model and adapters."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from loraserve.benchmarks.hosts.network import Host, VirtualNetwork
from loraserve.config import (
    BusConfig,
    ClusterConfig,
    Config,
    EngineConfig,
    GatewayConfig,
    ModelConfig,
    StoreConfig,
    TransferConfig,
    to_toml,
)
from loraserve.supervisor.processes import environment, kind_of
from loraserve.testing.tiny_model import write_peft_adapter, write_tiny_model
from loraserve.testing.tiny_tokenizer import write_tiny_tokenizer

FRONT, CONTROL, STORE = "front", "control", "store"
ENGINE_HOSTS = ("engines-0", "engines-1")
LAYOUT: Mapping[str, Sequence[str]] = {
    FRONT: ("gateway-0", "router"),
    CONTROL: ("monitor", "planner"),
    STORE: ("store",),
    ENGINE_HOSTS[0]: ("engine-0",),
    ENGINE_HOSTS[1]: ("engine-1",),
}
"""The processes of each host. Cells that need one host for all services cut several hosts at the same time."""
HOST_OF = {process: host for host, processes in LAYOUT.items() for process in processes}
FIRST_PORT = 5570
HTTP_PORT = 8000
STOP_TIMEOUT_S = 15.0
MODEL = "tiny"
ADAPTERS = {"alpha": 8, "beta": 16, "old": 8, "new": 8}
"""The rank of each adapter. Cells that change an adapter register the weights of ``new`` under the name ``old``."""
SIZES: Mapping[str, Any] = {"max_position_embeddings": 2048, "num_hidden_layers": 4}


class HostCluster:
    """The processes of a cluster by name. ``folder`` has the model, the adapters, the configuration and the logs."""

    def __init__(self, folder: Path, network: VirtualNetwork) -> None:
        self.network = network
        self.ended: list[str] = []
        """Descriptions of processes that ended by themselves."""
        self._folder = folder
        self._config = _config(folder, {name: host.address for name, host in network.hosts.items()})
        self._file = folder / "cluster.toml"
        self._file.write_text(to_toml(self._config))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._logs.mkdir(exist_ok=True)

    @property
    def _logs(self) -> Path:
        return self._folder / "logs"

    @property
    def adapters(self) -> dict[str, Path]:
        return {name: self._folder / name for name in ADAPTERS}

    def start(self, *names: str) -> None:
        """Start processes on their hosts without waiting until they are ready."""
        for name in names:
            kind = kind_of(name)
            command = [sys.executable, "-m", f"loraserve.{kind}", "--config", str(self._file), "--name", name]
            with (self._logs / f"{name}.out").open("ab") as output, self.host(name).entered():
                self._processes[name] = subprocess.Popen(
                    [*command, "--parent-pid", str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment(self._config, kind),
                    start_new_session=True,
                )

    def start_all(self) -> None:
        self.start(*HOST_OF)

    def host(self, process: str) -> Host:
        return self.network.hosts[HOST_OF[process]]

    def kill(self, name: str) -> None:
        """Send SIGKILL and wait for the end of the process."""
        self._processes[name].kill()
        self._processes[name].wait()

    def send(self, name: str, number: signal.Signals) -> None:
        self._processes[name].send_signal(number)

    def note_ended(self) -> None:
        """Restart processes that ended by themselves, and record them in ``ended``."""
        for name, process in list(self._processes.items()):
            status = process.poll()
            if status is not None:
                self.ended.append(f"{name} ended with status {status}")
                self.start(name)

    def stop(self) -> None:
        """Stop all processes, including those that are suspended."""
        for process in self._processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        for process in self._processes.values():
            try:
                process.wait(timeout=max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def session(self) -> aiohttp.ClientSession:
        """Return an HTTP session for the gateway, whose sockets are on the gateway's host."""
        host = self.host("gateway-0")

        def open_socket(address: Any) -> socket.socket:
            with host.entered():
                return socket.socket(*address[:3])

        connector = aiohttp.TCPConnector(limit=0, socket_factory=open_socket)
        return aiohttp.ClientSession(f"http://127.0.0.1:{HTTP_PORT}", connector=connector)

    def log_tails(self) -> str:
        """Return the end of every log file."""
        logs = sorted(self._logs.iterdir())
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in logs)


@contextmanager
def host_cluster(folder: Path, seed: int = 0) -> Iterator[HostCluster]:
    """Start the processes of LAYOUT, each on its host. They are not ready yet; see ``traffic.wait_ready``."""
    write_model(folder)
    with VirtualNetwork(tuple(LAYOUT), seed) as network:
        cluster = HostCluster(folder, network)
        try:
            cluster.start_all()
            yield cluster
        finally:
            cluster.stop()


def write_model(folder: Path) -> None:
    """Write the tiny model and its adapters into ``folder``."""
    model = folder / MODEL
    shape = write_tiny_model(model, "llama", **SIZES)
    write_tiny_tokenizer(model)
    for seed, (name, rank) in enumerate(ADAPTERS.items()):
        write_peft_adapter(folder / name, shape, rank, seed=seed, strength=1.0)


def _config(folder: Path, addresses: Mapping[str, str]) -> Config:
    peers = {}
    for number, (name, host) in enumerate(HOST_OF.items()):
        at, port = addresses[host], FIRST_PORT + 2 * number
        peers[name] = f"tcp://{at}:{port},tcp://{at}:{port + 1}"
    return Config(
        bus=BusConfig(peers=peers),
        cluster=ClusterConfig(
            engines=len(ENGINE_HOSTS),
            data_dir=str(folder / "data"),
            run_dir=str(folder / "run"),
            log_dir=str(folder / "logs"),
        ),
        model=ModelConfig(path=str(folder / MODEL), name=MODEL),
        engine=EngineConfig(
            device="cpu", weights="float32", slab_dtype="float32", threads=1, kv_bytes=64 << 20, pool_bytes=16 << 20
        ),
        store=StoreConfig(adapters={name: str(folder / name) for name in ADAPTERS}),
        gateway=GatewayConfig(host="127.0.0.1", port=HTTP_PORT),
        # All namespaces share the machine's boot id, so engines would take each other for neighbours.
        transfer=TransferConfig(transports=("tcp",)),
    )
