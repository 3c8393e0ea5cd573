"""The state file of a running local cluster. `down` and a second `up` read it to find the cluster."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import msgspec

FILE_NAME = "cluster.json"
CONFIG_NAME = "cluster.toml"
OWNED_FILE = re.compile(
    r"cluster\.toml|\.?cluster\.json(\.\d+)?"
    r"|(up|restart|store|planner|monitor|router|(engine|gateway)-\d+)\.(sock|pub|lock)"
)
"""Matches the files of a cluster in its run folder. Other files there may belong to the user."""


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """The supervisor's pid, the gateway's URL and the pids of the supervised processes."""

    pid: int
    url: str
    log_dir: str
    model: str
    ready: bool = False
    processes: dict[str, int] = msgspec.field(default_factory=dict)


def write_state(run_dir: Path, state: RunState) -> None:
    """Write the state file. Readers see either the old or the new content."""
    temporary = run_dir / f".{FILE_NAME}.{os.getpid()}"
    temporary.write_bytes(msgspec.json.encode(state))
    temporary.replace(run_dir / FILE_NAME)


def read_state(run_dir: Path) -> RunState | None:
    """Return the content of the state file, or None if it is missing or invalid."""
    try:
        return msgspec.json.decode((run_dir / FILE_NAME).read_bytes(), type=RunState)
    except (OSError, msgspec.DecodeError):
        return None


def clear_run_dir(run_dir: Path) -> None:
    """Remove the cluster's state, configuration, sockets and locks, and the folder if it is then empty."""
    for path in [path for path in run_dir.glob("*") if OWNED_FILE.fullmatch(path.name) and not path.is_dir()]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        run_dir.rmdir()


def is_ours(pid: int) -> bool:
    """Return whether a process of this project runs with this pid. Another program may have reused the pid."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    command = Path(f"/proc/{pid}/cmdline")
    try:
        return b"loraserve" in command.read_bytes()
    except OSError:
        # macOS has no /proc, so the command line cannot be checked there.
        return not Path("/proc").exists()


def stop_cluster(run_dir: Path, state: RunState, timeout_s: float) -> None:
    """Terminate the supervisor, or all processes if it is gone. Kill those that still run after ``timeout_s``."""
    _signal(state.pid, signal.SIGTERM)
    deadline_s = time.monotonic() + timeout_s
    pids = [state.pid, *state.processes.values()]
    while time.monotonic() < deadline_s and any(is_ours(pid) for pid in pids):
        if not is_ours(state.pid):
            for pid in state.processes.values():
                _signal(pid, signal.SIGTERM)
        time.sleep(0.1)
    for pid in pids:
        _signal(pid, signal.SIGKILL)
    clear_run_dir(run_dir)


def _signal(pid: int, number: signal.Signals) -> None:
    if is_ours(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
