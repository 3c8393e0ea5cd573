"""Clocks for tests: one that tests advance, and an event loop with virtual time."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from loraserve.clock import Clock, SystemClock

T = TypeVar("T")

START_UNIX_S = 1_700_000_000.0


class FakeClock:
    """A Clock that stands still until ``advance`` is called."""

    def __init__(self, monotonic_s: float = 0.0, unix_s: float = START_UNIX_S) -> None:
        self._monotonic_s = monotonic_s
        self._unix_s = unix_s

    def monotonic_s(self) -> float:
        return self._monotonic_s

    def unix_s(self) -> float:
        return self._unix_s

    def advance(self, seconds: float) -> None:
        self._monotonic_s += seconds
        self._unix_s += seconds


class LoopClock:
    """A Clock that follows the running event loop, virtual or not."""

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def unix_s(self) -> float:
        return START_UNIX_S + self.monotonic_s()


class DeadlockError(Exception):
    """Every task waits and no timer is set, so that no task can ever continue."""


class _VirtualSelector(selectors.DefaultSelector):
    """A selector that does not wait: the loop's clock jumps to the time of the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise DeadlockError(
                "no timer is set and no task can continue; print asyncio.all_tasks() to see where they wait"
            )
        self.now_s += max(0.0, timeout)
        return super().select(0)


def call_in_loop(loop: asyncio.AbstractEventLoop, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
    """Call the function in the next iteration of the loop, in no virtual time. A thread would take real time."""
    result = loop.create_future()

    def call() -> None:
        if not result.cancelled():
            try:
                result.set_result(func(*args))
            except Exception as error:
                result.set_exception(error)

    loop.call_soon(call)
    return result


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop with virtual time for MemoryNetwork, asyncio.sleep and asyncio.to_thread; not for sockets."""

    def __init__(self) -> None:
        self._virtual = _VirtualSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now_s

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        return call_in_loop(self, func, *args)


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in virtual time: an hour of waiting takes no time. Raises DeadlockError instead of hanging."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class ReplaceableClock:
    """A Clock that delegates to ``current``: the system's clock until a test replaces it."""

    def __init__(self) -> None:
        self.current: Clock = SystemClock()

    def monotonic_s(self) -> float:
        return self.current.monotonic_s()

    def unix_s(self) -> float:
        return self.current.unix_s()
