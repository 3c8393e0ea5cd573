"""The parent's side of a process that owns memory: it obeys lines on stdin and answers each with one line."""

import subprocess
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self


class OwnerProcess:
    """A child process that is killed at the end of the ``with`` block."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.kill()

    def tell(self, command: str) -> str:
        """Send a command and return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.line()

    def kill(self) -> None:
        """Send SIGKILL and wait for the end of the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()
