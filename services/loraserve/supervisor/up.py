"""Runs a local cluster: starts its processes, waits until they are ready, registers adapters, and stops it."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from loraserve.bus.protocol import Bus
from loraserve.bus.zmq import open_bus
from loraserve.config import Config, to_toml
from loraserve.errors import ConfigError, PeerError, RequestTimeoutError
from loraserve.messages import AdapterRegistered, Ping, Pong, RegisterAdapter
from loraserve.process import Parent
from loraserve.supervisor.logs import limit_logs
from loraserve.supervisor.processes import Processes, process_names
from loraserve.supervisor.state import CONFIG_NAME, RunState, clear_run_dir, write_state

READY_TIMEOUT_S = 300.0
PING_INTERVAL_S = 0.2
PING_TIMEOUT_S = 1.0
REGISTER_TIMEOUT_S = 60.0

Say = Callable[[str], None]


class Supervisor:
    """Runs one local cluster. Writes its configuration file at the start and removes its files at the end.

    ``listener`` is the bound socket on which all gateways accept connections.
    """

    def __init__(self, config: Config, adapters: Mapping[str, Path], say: Say, listener: socket.socket) -> None:
        self._config = config
        self._adapters = adapters
        self._say = say
        self._run_dir = Path(config.cluster.run_dir)
        self._log_dir = Path(config.cluster.log_dir)
        self._stop = asyncio.Event()
        self._state = RunState(
            pid=os.getpid(), url=base_url(config), log_dir=config.cluster.log_dir, model=config.model.name
        )
        config_file = self._run_dir / CONFIG_NAME
        self._processes = Processes(
            config, config_file, self._log_dir, lambda pids: self._update(processes=pids), say, listener
        )
        self._write_config(config_file)

    async def run(self, on_ready: Callable[[], None], parent: Parent | None = None) -> None:
        """Run the cluster until a signal arrives or ``parent`` ends. Raises LoraServeError if the cluster fails."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop.set)
        watchers = [asyncio.ensure_future(self._processes.watch(name)) for name in process_names(self._config)]
        main = asyncio.ensure_future(self._main(on_ready))
        helpers = [asyncio.ensure_future(limit_logs(self._log_dir, self._say))]
        if parent:
            helpers.append(asyncio.ensure_future(parent.watch(self._stop.set)))
        try:
            done, _ = await asyncio.wait([*watchers, main], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._say("stopping")
            await self._processes.stop()
            tasks = [*watchers, main, *helpers]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            clear_run_dir(self._run_dir)

    async def _main(self, on_ready: Callable[[], None]) -> None:
        stopped = asyncio.ensure_future(self._stop.wait())
        starting = asyncio.ensure_future(self._become_ready())
        await asyncio.wait([stopped, starting], return_when=asyncio.FIRST_COMPLETED)
        if not self._stop.is_set():
            starting.result()
            self._processes.ready = True
            # Called before the state file is updated, because `up --detach` stops showing output after the update.
            on_ready()
            self._update(ready=True)
        starting.cancel()
        await stopped

    async def _become_ready(self) -> None:
        # Without an inbox the bus binds no address. Address templates for TCP need not have one for this process.
        bus = open_bus(self._config, f"up-{os.getpid()}", None)
        try:
            await self._wait_ready(bus)
            for name, path in self._adapters.items():
                await self._register(bus, name, path)
        finally:
            await bus.close()

    async def _wait_ready(self, bus: Bus) -> None:
        started_s = time.monotonic()
        waiting = process_names(self._config)
        while waiting:
            if time.monotonic() - started_s > READY_TIMEOUT_S:
                raise ConfigError(
                    f"{', '.join(waiting)} not ready after {READY_TIMEOUT_S:.0f} s; see the logs in {self._log_dir}"
                )
            states = await asyncio.gather(*(_is_ready(bus, name) for name in waiting))
            for name in [name for name, ready in zip(waiting, states, strict=True) if ready]:
                waiting.remove(name)
                self._say(f"{name} ready after {time.monotonic() - started_s:.1f} s")
            await asyncio.sleep(PING_INTERVAL_S if waiting else 0)

    async def _register(self, bus: Bus, name: str, path: Path) -> None:
        message = RegisterAdapter(name=name, path=str(path), replace=True)
        try:
            answer = await bus.request("store", message, AdapterRegistered, REGISTER_TIMEOUT_S)
        except PeerError as error:
            raise ConfigError(f"adapter {name} ({path}): {error.message}") from error
        self._say(f"adapter {name}: rank {answer.adapter.rank}, {answer.adapter.slab_bytes / 2**20:.1f} MiB")

    def _update(self, **changes: object) -> None:
        self._state = msgspec.structs.replace(self._state, **changes)
        write_state(self._run_dir, self._state)

    def _write_config(self, path: Path) -> None:
        path.touch(mode=0o600)
        # Without log_dir the processes log to stderr, which the supervisor redirects to one file per process.
        cluster = msgspec.structs.replace(self._config.cluster, log_dir="")
        path.write_text(to_toml(msgspec.structs.replace(self._config, cluster=cluster)))


async def _is_ready(bus: Bus, name: str) -> bool:
    with contextlib.suppress(RequestTimeoutError, PeerError):
        answer = await bus.request(name, Ping(), Pong, PING_TIMEOUT_S)
        return answer.state == "READY"
    return False


def base_url(config: Config) -> str:
    """Return the gateway's URL for clients on this machine, with loopback in place of a wildcard address."""
    host = config.gateway.host
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{config.gateway.port}"
