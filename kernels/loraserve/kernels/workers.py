"""Splits one kernel call over the process's compute threads.

A part is one call of a compiled function without the GIL. The calling thread takes the first part itself; the others go
to threads that sleep on an operating-system semaphore between calls, so that idle cores stay free for others.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import torch

MAX_PARTS = 64


def parts() -> int:
    """Threads to split over: what torch was told to use."""
    return min(torch.get_num_threads(), MAX_PARTS)


class _Worker(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name="kernel", daemon=True)
        self.calls: SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = SimpleQueue()
        self.done: SimpleQueue[BaseException | None] = SimpleQueue()

    def run(self) -> None:
        while True:
            function, arguments = self.calls.get()
            try:
                function(*arguments)
            except BaseException as error:
                self.done.put(error)
            else:
                self.done.put(None)


_workers: list[_Worker] = []


def run_parts(function: Callable[..., None], count: int, arguments: tuple[Any, ...]) -> None:
    """Call function(part, count, *arguments) for every part at once and wait for all. One caller at a time."""
    while len(_workers) < count - 1:
        _workers.append(_Worker())
        _workers[-1].start()
    for part in range(1, count):
        _workers[part - 1].calls.put((function, (part, count, *arguments)))
    function(0, count, *arguments)
    for part in range(1, count):
        error = _workers[part - 1].done.get()
        if error is not None:
            raise error
