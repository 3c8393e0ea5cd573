"""Starts real engines with a store and a monitor. driver.py takes the place of gateway and router."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from loraserve.config import ClusterConfig, Config, EngineConfig, ModelConfig, to_toml
from loraserve.supervisor.processes import environment, kind_of

SERVICES = ("store", "monitor")
STOP_TIMEOUT_S = 15.0
LOAD_INTERVAL_S = 0.1


def config_for(
    folder: Path, run_dir: Path, model: Path, engines: int, overrides: Mapping[str, Any] | None = None
) -> Config:
    """Return a configuration with one compute thread per engine.

    ``overrides`` has whole sections by name; for ``engine`` it has single fields.
    """
    sections = dict(overrides or {})
    engine = {"threads": 1, "load_interval_s": LOAD_INTERVAL_S, **sections.pop("engine", {})}
    cluster = ClusterConfig(
        engines=engines, run_dir=str(run_dir), data_dir=str(folder / "data"), log_dir=str(folder / "logs")
    )
    return Config(cluster=cluster, model=ModelConfig(path=str(model)), engine=EngineConfig(**engine), **sections)


@contextmanager
def short_folder() -> Iterator[Path]:
    """Create a temporary folder with a short path, which socket names need."""
    with tempfile.TemporaryDirectory(prefix="ls-") as folder:
        yield Path(folder) / "run"


class Engines:
    """The processes of one configuration. They are started by name and all stopped at the end of the block.

    ``settings`` has additional section.key=value settings by process name. Logs are in ``config.cluster.log_dir``.
    """

    def __init__(self, folder: Path, config: Config, settings: Mapping[str, Sequence[str]] | None = None) -> None:
        self.config = config
        self._settings = settings or {}
        self._file = folder / "engines.toml"
        self._logs = Path(config.cluster.log_dir)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for made in (folder, self._logs, Path(config.cluster.data_dir)):
            made.mkdir(parents=True, exist_ok=True)
        self._file.write_text(to_toml(config))

    def __enter__(self) -> "Engines":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self, *names: str) -> None:
        """Start processes without waiting for them; see Driver.ready."""
        for name in names:
            sets = [f"--set={setting}" for setting in self._settings.get(name, ())]
            command = [sys.executable, "-m", f"loraserve.{kind_of(name)}", "--config", str(self._file), "--name", name]
            with (self._logs / f"{name}.out").open("ab") as output:
                self._processes[name] = subprocess.Popen(
                    [*command, *sets, "--parent-pid", str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment(self.config, kind_of(name)),
                )

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def pids(self) -> dict[str, int]:
        """Return the pids of running processes by name."""
        return {name: process.pid for name, process in self._processes.items() if process.poll() is None}

    def send(self, name: str, number: signal.Signals) -> None:
        self._processes[name].send_signal(number)

    def kill(self, name: str) -> None:
        """Send SIGKILL and wait for the end of the process."""
        self._processes[name].kill()
        self._processes[name].wait()

    def stop(self) -> None:
        """Stop all processes, engines first, including those suspended with SIGSTOP."""
        for name in sorted(self._processes, key=lambda each: each in SERVICES):
            process = self._processes[name]
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def events(self, name: str, event: str) -> Iterator[dict[str, Any]]:
        """Yield the log entries of an event, of all runs of the process."""
        path = self._logs / f"{name}.log"
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            if f'"{event}"' not in line:
                continue
            try:
                found = json.loads(line)
            except ValueError:
                # The process was killed while it wrote the line.
                continue
            if found.get("event") == event:
                yield found

    def log_tails(self) -> str:
        """Return the ends of all log files, for error messages."""
        files = sorted(self._logs.iterdir())
        return "\n".join(f"{file.name}: {file.read_text(errors='replace')[-1500:]}" for file in files)
