"""Starts the processes of a cluster, restarts those that die, stops them all."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from loraserve.config import Config, engine_count, engine_names
from loraserve.supervisor.restart import RestartHistory, StopCluster

STOP_TIMEOUT_S = 15.0
LAST_LINES = 10


class ProcessFailed(Exception):
    """A process ended in a way that a restart cannot mend; the text says which and why."""


def process_names(config: Config) -> list[str]:
    """Every process of the local cluster, in the order in which they are started."""
    return ["store", "planner", "monitor", "router", *engine_names(config), "gateway-0"]


def kind_of(name: str) -> str:
    """``engine-0`` is an ``engine``."""
    return name.rpartition("-")[0] or name


def threads_per_engine(config: Config) -> int:
    """Cores are split: engines that compete for them slow each other down far more than their share."""
    return config.engine.threads or max(1, (os.cpu_count() or 1) // engine_count(config))


def environment(config: Config, kind: str) -> dict[str, str]:
    """The child's environment: thread pools sized for it, and nothing reached over the network by accident."""
    threads = str(threads_per_engine(config) if kind == "engine" else 1)
    values = {name: value for name, value in os.environ.items() if not name.startswith("LORASERVE_")}
    values.update(
        OMP_NUM_THREADS=threads,
        MKL_NUM_THREADS=threads,
        OMP_WAIT_POLICY="PASSIVE",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        PYTHONUNBUFFERED="1",
        # Modules of the folder in which somebody stands are not ours.
        PYTHONSAFEPATH="1",
    )
    return values


class Processes:
    """The children of one supervisor. ``on_change`` is called with {name: pid} whenever one starts."""

    def __init__(
        self,
        config: Config,
        config_file: Path,
        log_dir: Path,
        on_change: Callable[[Mapping[str, int]], None],
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._config_file = config_file
        self._log_dir = log_dir
        self._on_change = on_change
        self._say = say
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._stopping = False
        self.ready = False

    async def watch(self, name: str) -> None:
        """Keep one process alive until ``stop``. Raises ProcessFailed where a restart cannot help."""
        history = RestartHistory(name)
        while not self.stopping():
            started_s = time.monotonic()
            child = await self._spawn(name)
            status = await child.wait()
            if self.stopping():
                return
            decision = history.ended(status, time.monotonic() - started_s, self.ready)
            if isinstance(decision, StopCluster):
                raise ProcessFailed(f"{decision.reason}: {last_words(self.log_file(name), name)}")
            self._say(f"{name} ended (exit status {status}); starting it again in {decision.delay_s:.1f} s")
            await asyncio.sleep(decision.delay_s)

    async def stop(self) -> None:
        """SIGTERM to all, SIGKILL to who stays."""
        self._stopping = True
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

    def stopping(self) -> bool:
        return self._stopping

    def log_file(self, name: str) -> Path:
        return self._log_dir / f"{name}.log"

    async def _spawn(self, name: str) -> asyncio.subprocess.Process:
        kind = kind_of(name)
        with self.log_file(name).open("ab") as log:
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                f"loraserve.{kind}",
                *("--config", str(self._config_file), "--name", name, "--parent-pid", str(os.getpid())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(self._config, kind),
                # A terminal's Ctrl-C goes to the supervisor alone, which then stops the others in order.
                start_new_session=True,
            )
        self._children[name] = child
        self._on_change({n: c.pid for n, c in self._children.items() if c.returncode is None})
        return child


def last_words(log_file: Path, name: str) -> str:
    """The reason that a process gave before it ended, or else the last line of its log."""
    try:
        lines = [line for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    # Not from further back: the log goes on from start to start.
    reasons = [line for line in lines[-LAST_LINES:] if line.startswith(f"{name}: ")]
    return [*(lines or ["no output"]), *reasons][-1] + f" (log: {log_file})"


def _send(child: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)
