"""Services in forked processes.

Forking avoids the imports, which take a new process about twenty seconds in the virtual machine of the RDMA tests.
"""

import os
import sys
from multiprocessing import get_context
from types import TracebackType

from loraserve.config import Config
from loraserve.process import run_process
from loraserve.service import Service

FORK = get_context("fork")
STOPS_WITHIN_S = 30.0


class ForkedService:
    """A service in a forked process, killed at the end of the ``with`` block. Start it where no event loop runs."""

    def __init__(self, kind: type[Service], name: str, config: Config) -> None:
        self._process = FORK.Process(target=_run, args=(kind, name, config, os.getpid()), name=name, daemon=True)
        self._process.start()

    def __enter__(self) -> "ForkedService":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def kill(self) -> None:
        """Send SIGKILL and wait for the end of the process."""
        self._process.kill()
        self._process.join()

    def stop(self) -> int | None:
        """Send SIGTERM, as a supervisor does. Returns the exit status, None if the process does not end."""
        self._process.terminate()
        self._process.join(STOPS_WITHIN_S)
        return self._process.exitcode


def _run(kind: type[Service], name: str, config: Config, parent_pid: int) -> None:
    sys.exit(run_process(kind, name, config, parent_pid))
