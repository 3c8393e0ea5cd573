"""Work by name that may be called off, before it has begun too."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class CalledOff(Exception):
    """Nobody wants the work any more, and it is over."""


class Cancellable:
    """One piece of work a name at a time: ``expect`` it, ``run`` it in a task of its own, and perhaps ``cancel`` it."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[Any] | None] = {}

    def expect(self, name: str) -> None:
        """Its task is about to begin."""
        self._tasks[name] = None

    def cancel(self, name: str) -> None:
        """``run`` raises CalledOff once the work has ended. Where that has ended already, this changes nothing."""
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()

    async def run(self, name: str, work: Coroutine[Any, Any, T]) -> T:
        """Raises CalledOff; where it is the whole task that is cancelled, CancelledError."""
        task = asyncio.current_task()
        if task is None or name not in self._tasks:
            work.close()
            raise CalledOff(name)
        self._tasks[name] = task
        try:
            return await work
        except asyncio.CancelledError:
            if name in self._tasks:
                raise
            task.uncancel()
            raise CalledOff(name) from None
        finally:
            self._tasks.pop(name, None)
