"""A process that owns memory which others read, from outside: it obeys lines and answers each with one."""

import subprocess
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self


class OwnerProcess:
    """Killed at the end at the latest."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.kill()

    def tell(self, command: str) -> str:
        """Its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.line()

    def kill(self) -> None:
        """kill -9, and returns when it is over."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()
