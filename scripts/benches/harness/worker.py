"""Runs one side of a comparison in a process of its own, with the settings that suit it best."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from harness.report import BenchError

WORKERS = Path(__file__).resolve().parent.parent / "workers"


class Worker:
    """Runs ``workers/NAME.py``; ``ask`` sends a line of JSON and waits for a line in answer."""

    def __init__(self, name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._name = name
        self._process = subprocess.Popen(
            [sys.executable, str(WORKERS / f"{name}.py"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.hello: Any = None

    def ask(self, **question: Any) -> Any:
        """Send a question and return the answer. Raises BenchError if the process ends."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read()

    def __enter__(self) -> "Worker":
        """Wait until the process is ready. The constructor starts it, so that several can start concurrently."""
        self.hello = self._read()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"the {self._name} side ended with status {self._process.wait()}")
        return json.loads(line)


def serve(hello: Any, answer: Callable[[dict[str, Any]], Any]) -> None:
    """Run a worker: print ``hello``, then answer each question until standard input closes."""
    # Output of libraries must not be mixed with the answers.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print(json.dumps(hello), file=out)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=out)
