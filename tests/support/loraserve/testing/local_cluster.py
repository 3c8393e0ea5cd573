"""A real local cluster for tests and benchmarks, and a small HTTP client.

The cluster is started with the `loraserve up` command in a data folder of its own. It stops when the block that started
it is left, and also when the process that started it ends in any way: the supervisor watches it (``--parent-pid``).
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from loraserve.errors import LoraServeError

START_TIMEOUT_S = 240.0


class Answer(NamedTuple):
    """The outcome of a stream: its text, finish reason and error, the time of each piece and the engine."""

    text: str
    finish: str | None
    error: dict[str, Any] | None
    times_s: tuple[float, ...]
    engine: str


class LocalCluster:
    """A context manager that starts a cluster and stops it. Logs stay in ``data_dir/logs``."""

    def __init__(self, data_dir: Path, *flags: str, adapters: Mapping[str, Path] | None = None) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._flags = [*flags, *(f"--adapter={name}={path}" for name, path in (adapters or {}).items())]

    def __enter__(self) -> "LocalCluster":
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def command(self, name: str, *flags: str) -> list[str]:
        """Return the command line of ``loraserve NAME`` for this data folder."""
        parent = ["--parent-pid", str(os.getpid())] if name == "up" else []
        return [sys.executable, "-m", "loraserve.cluster", name, "--data", str(self.data_dir), *parent, *flags]

    def up(self) -> None:
        """Start the cluster and return once it serves.

        Raises:
            LoraServeError: The cluster does not start; the text has its output and its logs.
        """
        command = self.command("up", "--detach", "--port", str(self.port), *self._flags)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S)
        except BaseException:
            self.down()
            raise
        if done.returncode != 0:
            raise LoraServeError(f"the cluster did not start:\n{done.stderr}\n{self.log_tails()}")

    @contextmanager
    def starting(self, *flags: str) -> Iterator["subprocess.Popen[bytes]"]:
        """Run ``loraserve up`` in the background. The cluster is stopped when the block is left, however it ends."""
        process = subprocess.Popen(self.command("up", *flags), stderr=subprocess.DEVNULL)
        try:
            yield process
        finally:
            self.down()
            if process.poll() is None:
                process.kill()
            process.wait()

    def down(self) -> None:
        """Stop the cluster. Nothing happens if none runs."""
        subprocess.run(self.command("down"), capture_output=True, timeout=60, check=True)

    def pids(self) -> dict[str, int]:
        """Return the processes by name, as the supervisor last wrote them to its state file."""
        state = json.loads((self.data_dir / "run" / "cluster.json").read_text())
        return {"supervisor": state["pid"], **state["processes"]}

    def kill(self, name: str) -> None:
        """Send SIGKILL, as the out-of-memory killer does."""
        os.kill(self.pids()[name], signal.SIGKILL)

    def log_tails(self) -> str:
        """Return the end of every log file."""
        logs = sorted((self.data_dir / "logs").glob("*.log"))
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in logs)

    def session(self) -> aiohttp.ClientSession:
        """Return an HTTP session for the gateway, without a limit on connections."""
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=START_TIMEOUT_S)
        return aiohttp.ClientSession(self.url, connector=connector, timeout=timeout)

    async def admin(self, http: aiohttp.ClientSession) -> dict[str, Any]:
        """Return the answer of /admin/cluster."""
        async with http.get("/admin/cluster") as response:
            content: dict[str, Any] = await response.json()
            return content

    async def wait_idle(self, http: aiohttp.ClientSession, timeout_s: float = 30.0) -> dict[str, Any]:
        """Wait until no engine has a request, or the timeout. Returns the last answer of /admin/cluster."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            state = await self.admin(http)
            loads = [engine["load"] for engine in state["engines"]]
            if (
                all(load["queue"]["running"] + load["queue"]["waiting"] == 0 for load in loads)
                or time.monotonic() > deadline_s
            ):
                return state
            await asyncio.sleep(0.2)


def free_port() -> int:
    """Return a port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def chat(http: aiohttp.ClientSession, model: str, question: str, **options: Any) -> Answer:
    """Send a streamed chat request, greedy by default. Raises AssertionError if it is refused."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "temperature": 0,
        "max_tokens": 40,
        **options,
    }
    text: list[str] = []
    times_s: list[float] = []
    finish, error = None, None
    async with http.post("/v1/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()
        engine = response.headers.get("x-loraserve-engine", "")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            error = event.get("error", error)
            for choice in event.get("choices", ()):
                finish = choice["finish_reason"] or finish
                if piece := choice["delta"].get("content"):
                    text.append(piece)
                    times_s.append(time.monotonic())
    return Answer("".join(text), finish, error, tuple(times_s), engine)
