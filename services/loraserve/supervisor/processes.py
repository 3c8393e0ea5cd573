"""Starts, restarts and stops the processes of a local cluster."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from loraserve.config import Config, engine_count, engine_names, gateway_names
from loraserve.errors import LoraServeError
from loraserve.supervisor.restart import RestartHistory, StopCluster

STOP_TIMEOUT_S = 15.0
REASON_LINES = 10


class ProcessFailedError(LoraServeError):
    """A process ended and a restart cannot help. The text names the process and the reason."""


def process_names(config: Config) -> list[str]:
    """Return the names of the cluster's processes in starting order."""
    return ["store", "planner", "monitor", "router", *engine_names(config), *gateway_names(config)]


def kind_of(name: str) -> str:
    """Return the name of the package that a process runs: ``engine`` for ``engine-0``."""
    return name.rpartition("-")[0] or name


def threads_per_engine(config: Config) -> int:
    """Return the number of threads of an engine. By default the engines share the cores equally."""
    return config.engine.threads or max(1, (os.cpu_count() or 1) // engine_count(config))


def environment(config: Config, kind: str) -> dict[str, str]:
    """Return a child's environment variables, which set thread pool sizes and disable downloads by libraries."""
    threads = str(threads_per_engine(config) if kind == "engine" else 1)
    values = {name: value for name, value in os.environ.items() if not name.startswith("LORASERVE_")}
    values.update(
        OMP_NUM_THREADS=threads,
        MKL_NUM_THREADS=threads,
        OMP_WAIT_POLICY="PASSIVE",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        PYTHONUNBUFFERED="1",
        # Keeps Python from importing modules of the user's working directory.
        PYTHONSAFEPATH="1",
    )
    return values


class Processes:
    """The child processes of a supervisor. Calls ``on_change`` with {name: pid} when a child starts.

    ``listener`` is the bound socket on which all gateways accept connections.
    """

    def __init__(
        self,
        config: Config,
        config_file: Path,
        log_dir: Path,
        on_change: Callable[[dict[str, int]], None],
        say: Callable[[str], None],
        listener: socket.socket,
    ) -> None:
        self._config = config
        self._config_file = config_file
        self._log_dir = log_dir
        self._on_change = on_change
        self._say = say
        self._listener = listener
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._stopping = False
        self.ready = False

    async def watch(self, name: str) -> None:
        """Run a process and restart it until `stop` is called. Raises ProcessFailedError if a restart cannot help."""
        history = RestartHistory(name)
        while not self.is_stopping():
            started_s = time.monotonic()
            child = await self._spawn(name)
            status = await child.wait()
            if self.is_stopping():
                return
            decision = history.on_exit(status, time.monotonic() - started_s, self.ready)
            if isinstance(decision, StopCluster):
                raise ProcessFailedError(f"{decision.reason}: {exit_reason(self.log_file(name), name)}")
            when = f"in {decision.delay_s:.1f} s" if decision.delay_s else "now"
            self._say(f"{name} ended with exit status {status}; restarting it {when}")
            await asyncio.sleep(decision.delay_s)

    async def stop(self) -> None:
        """Send SIGTERM to all children. If any still runs after STOP_TIMEOUT_S, send SIGKILL."""
        self._stopping = True
        # Later connections are refused as soon as the gateways have closed their copies of the socket.
        self._listener.close()
        children = [child for child in self._children.values() if child.returncode is None]
        for child in children:
            _send(child, signal.SIGTERM)
        waits = [asyncio.ensure_future(child.wait()) for child in children]
        if waits:
            _, late = await asyncio.wait(waits, timeout=STOP_TIMEOUT_S)
            if late:
                for child in children:
                    _send(child, signal.SIGKILL)
                await asyncio.wait(late)

    def is_stopping(self) -> bool:
        return self._stopping

    def log_file(self, name: str) -> Path:
        return self._log_dir / f"{name}.log"

    async def _spawn(self, name: str) -> asyncio.subprocess.Process:
        kind = kind_of(name)
        passed = (self._listener.fileno(),) if kind == "gateway" else ()
        with self.log_file(name).open("ab") as log:
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                f"loraserve.{kind}",
                *("--config", str(self._config_file), "--name", name, "--parent-pid", str(os.getpid())),
                *(flag for descriptor in passed for flag in ("--set", f"gateway.listen_fd={descriptor}")),
                pass_fds=passed,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(self._config, kind),
                # Ctrl-C in a terminal must reach only the supervisor, which then stops its children.
                start_new_session=True,
            )
        self._children[name] = child
        self._on_change({n: c.pid for n, c in self._children.items() if c.returncode is None})
        return child


def exit_reason(log_file: Path, name: str) -> str:
    """Return the error that a process printed before it ended, or else its last log line, with the log's path."""
    try:
        lines = [line for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    # Only the last lines are searched, because a restarted process appends to the log of earlier runs.
    reasons = [line for line in lines[-REASON_LINES:] if line.startswith(f"{name}: ")]
    return [*(lines or ["no output"]), *reasons][-1] + f" (log: {log_file})"


def _send(child: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)
