"""Restarts processes of a running local cluster one after the other, while the others serve.

This runs in its own process. It sends SIGTERM to a process, whose supervisor then starts it again, and waits until the
new process is ready before it continues with the next one.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from loraserve.bus.protocol import Bus
from loraserve.bus.zmq import open_bus
from loraserve.config import Config, engine_names
from loraserve.errors import ConfigError, LoraServeError, PeerError, RequestTimeoutError
from loraserve.messages import ClusterLoad, Ping, Pong
from loraserve.supervisor.processes import process_names
from loraserve.supervisor.state import is_ours, read_state

POLL_S = 0.1
PING_TIMEOUT_S = 1.0
PROGRESS_INTERVAL_S = 2.0
LEAST_STOP_TIMEOUT_S = 30.0
STOP_MARGIN_S = 10.0
SETTLE_S = 0.5
"""Time in which a publication that this process has received reaches all other processes."""


class RestartError(LoraServeError):
    """A process could not be restarted. The text names the process and the remedy."""


def select_processes(config: Config, chosen: Sequence[str], force: bool) -> list[str]:
    """Return the processes to restart in starting order; all if none is chosen.

    Raises:
        ConfigError: A chosen process does not exist, or is the only engine and ``force`` is False.
    """
    names = process_names(config)
    for name in chosen:
        if name not in names:
            raise ConfigError(f"there is no process {name!r}; this cluster has {', '.join(names)}")
    selected = [name for name in names if name in chosen or not chosen]
    engines = engine_names(config)
    if len(engines) == 1 and engines[0] in selected and not force:
        raise ConfigError(
            f"{engines[0]} is the only engine, so its restart interrupts all requests; restart it with --force, "
            "or start the cluster with --engines 2"
        )
    return selected


class RollingRestart:
    """Restarts processes of the cluster whose state file is in ``cluster.run_dir``. ``timeout_s`` is for each one."""

    def __init__(self, config: Config, timeout_s: float, force: bool, say: Callable[[str], None]) -> None:
        self._config = config
        self._timeout_s = timeout_s
        self._force = force
        self._say = say
        self._run_dir = Path(config.cluster.run_dir)
        self._engines = engine_names(config)
        self._load: ClusterLoad | None = None

    async def run(self, names: Sequence[str]) -> list[str]:
        """Restart the processes. Returns those that had to be killed. Raises RestartError if one does not come back."""
        bus = open_bus(self._config, f"restart-{os.getpid()}", ClusterLoad, listens=False)
        bus.subscribe("monitor", "load")
        receiving = asyncio.ensure_future(self._receive(bus))
        try:
            return [name for name in names if not await self._restart(bus, name)]
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
            await bus.close()

    async def _receive(self, bus: Bus) -> None:
        while True:
            message = (await bus.receive()).message
            if isinstance(message, ClusterLoad):
                self._load = message

    async def _restart(self, bus: Bus, name: str) -> bool:
        """Restart one process. Returns whether it stopped by itself, without SIGKILL."""
        others = await self._wait_for_engines(name)
        pid, started_s = self._pid_of(name), time.monotonic()
        self._say(f"{name}: stopping pid {pid}")
        stopped = await self._stop(name, pid)
        pong = await self._wait_ready(bus, name, pid)
        await self._wait(lambda: self._is_known(pong, others), f"{name}: waiting for the monitor's report")
        await asyncio.sleep(SETTLE_S)
        self._say(f"{name}: ready after {time.monotonic() - started_s:.1f} s, pid {pong.pid}")
        return stopped

    async def _wait_for_engines(self, name: str) -> set[str]:
        """Return the ready engines except ``name``. If ``name`` is an engine, wait until there is one."""
        if name in self._engines and not self._force:
            await self._wait(lambda: bool(self._ready_engines() - {name}), f"{name}: waiting for another ready engine")
        return self._ready_engines() - {name}

    async def _stop(self, name: str, pid: int) -> bool:
        """Stop a process and return True. If it ignores SIGTERM, kill it and return False."""
        timeout_s = max(LEAST_STOP_TIMEOUT_S, self._config.gateway.drain_timeout_s + STOP_MARGIN_S)
        _signal(pid, signal.SIGTERM)
        try:
            await self._wait(lambda: not is_ours(pid), f"{name}: finishing its work", timeout_s)
        except RestartError:
            self._say(f"{name}: did not end within {timeout_s:g} s of SIGTERM, killing it")
            _signal(pid, signal.SIGKILL)
            return False
        return True

    async def _wait_ready(self, bus: Bus, name: str, old_pid: int) -> Pong:
        """Wait until another process than ``old_pid`` answers as READY."""
        started_s = reported_s = time.monotonic()
        while (now := time.monotonic()) - started_s < self._timeout_s:
            self._pid_of(name)
            doing = "starting"
            with contextlib.suppress(RequestTimeoutError, PeerError):
                pong = await bus.request(name, Ping(), Pong, PING_TIMEOUT_S)
                if pong.pid != old_pid and pong.state == "READY":
                    return pong
                doing = pong.detail or doing
            if now - reported_s >= PROGRESS_INTERVAL_S:
                reported_s = now
                self._say(f"{name}: {doing} ... {now - started_s:.0f} s")
            await asyncio.sleep(POLL_S)
        log_dir = self._config.cluster.log_dir or read_log_dir(self._run_dir)
        raise RestartError(f"{name} is not ready after {self._timeout_s:g} s; see {log_dir}/{name}.log")

    async def _wait(self, condition: Callable[[], bool], what: str, timeout_s: float | None = None) -> None:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        started_s = reported_s = time.monotonic()
        while not condition():
            now = time.monotonic()
            if now - started_s > timeout_s:
                raise RestartError(f"{what} took more than {timeout_s:g} s; scripts/status shows the processes")
            if now - reported_s >= PROGRESS_INTERVAL_S:
                reported_s = now
                self._say(f"{what} ... {now - started_s:.0f} s")
            await asyncio.sleep(POLL_S)

    def _ready_engines(self) -> set[str]:
        seen = self._load.engines if self._load else ()
        return {engine.engine for engine in seen if engine.alive and engine.load.state == "READY"}

    def _is_known(self, pong: Pong, others: set[str]) -> bool:
        """Return whether the monitor reports what the other processes must know before the next restart.

        That is a restarted engine itself, and the engines that a restarted monitor has to find again.
        """
        if self._load is None:
            return False
        if pong.name == "monitor":
            return self._load.incarnation == pong.incarnation and others <= self._ready_engines()
        if pong.name in self._engines:
            ready = {engine.load.incarnation for engine in self._load.engines if engine.load.state == "READY"}
            return pong.incarnation in ready
        return True

    def _pid_of(self, name: str) -> int:
        """Return the process id of a process. Raises RestartError if the cluster has ended."""
        state = read_state(self._run_dir)
        if state is None or not is_ours(state.pid):
            raise RestartError("the cluster has stopped meanwhile; start it with scripts/up")
        if name not in state.processes:
            raise RestartError(f"{name} is not running at the moment; scripts/status shows the processes")
        return state.processes[name]


def read_log_dir(run_dir: Path) -> str:
    """Return the folder of the cluster's logs, or "" if the cluster has ended."""
    state = read_state(run_dir)
    return state.log_dir if state else ""


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
