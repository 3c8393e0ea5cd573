"""Simulated processes in one event loop with virtual time: they can be paused and killed, and each has its own clock.

Every callback of an event loop has a context. The context of a process's first task is inherited by all its tasks,
timers and futures, so the loop knows to which process a callback belongs.
"""

import asyncio
import heapq
from asyncio import events
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar
from typing import Any, TypeVar

from loraserve.clock import LONGEST_GAP_S
from loraserve.testing.clock import START_UNIX_S, DeadlockError, call_in_loop

T = TypeVar("T")

_current: ContextVar["Process | None"] = ContextVar("process", default=None)


class Process:
    """One run of a process. Callbacks of a paused process wait until it is resumed, as those of a stopped one do."""

    def __init__(self, loop: "ProcessLoop", name: str) -> None:
        self.name = name
        self.loop = loop
        self.paused = False
        self.clock = ProcessClock(self)
        self.context = Context()
        self.context.run(_current.set, self)
        self.waiting: list[events.Handle] = []
        """Callbacks that became ready during the pause."""
        self.waiting_timers: list[events.Handle] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.paused_s = 0.0
        """Time in pauses that its clock leaves out, as RunningClock does."""
        self.stopped_s = 0.0

    def spawn(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Run a coroutine as a part of this process."""
        return self.loop.create_task(work, context=self.context)

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function as a part of this process; after the pause if it is paused."""
        self.loop.call_soon(function, *arguments, context=self.context)

    def pause(self) -> None:
        self.paused = True
        self.stopped_s = self.loop.time()

    def resume(self) -> None:
        """Continue. As in a real loop, sockets that became readable are served before the timers that are due."""
        self.paused = False
        self.paused_s += max(0.0, self.loop.time() - self.stopped_s - LONGEST_GAP_S)
        self.loop.continue_with(self.waiting + self.waiting_timers)
        self.waiting, self.waiting_timers = [], []

    def kill(self) -> None:
        """Cancel all tasks. Call this after its bus was cut off, so that nothing they do on the way out is seen."""
        self.paused = False
        self.loop.continue_with(self.waiting)
        self.waiting, self.waiting_timers = [], []
        for task in self.tasks:
            if not task.done():
                task.cancel()


class ProcessClock:
    """The Clock of a process. Its monotonic time leaves out pauses, and its wall-clock time can be stepped."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.unix_step_s = 0.0

    def monotonic_s(self) -> float:
        return self._process.loop.now_s - self._process.paused_s

    def unix_s(self) -> float:
        return START_UNIX_S + self._process.loop.now_s + self.unix_step_s


class ProcessLoop(asyncio.BaseEventLoop):
    """An event loop with virtual time and simulated processes, for tasks, timers and ``run_in_executor`` only.

    It replaces ``_run_once`` of asyncio's loop, which waits for sockets, because a system call in each iteration would
    take most of the time of a run.
    """

    _ready: Any
    _write_to_self: Callable[[], None]

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self._timers: list[tuple[float, int, events.TimerHandle]] = []
        self._timer_count = 0
        self.tasks: list[asyncio.Task[Any]] = []
        self.is_over = False
        """Set when the run has been judged and its processes are to end."""

    def time(self) -> float:
        return self.now_s

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> events.Handle:
        handle = events.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    # No other thread works for this loop.
    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> events.TimerHandle:
        handle = events.TimerHandle(when, callback, args, self, context)
        self._timer_count += 1
        heapq.heappush(self._timers, (when, self._timer_count, handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> events.TimerHandle:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def create_task(self, coro: Any, *, name: Any = None, context: Context | None = None) -> "asyncio.Task[Any]":
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        process = context.get(_current) if context is not None else _current.get()
        self.tasks.append(task)
        if process is not None:
            process.tasks.append(task)
        return task

    def continue_with(self, handles: list[events.Handle]) -> None:
        self._ready.extend(handles)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> "asyncio.Future[Any]":
        return call_in_loop(self, func, *args)

    def _timer_handle_cancelled(self, handle: events.TimerHandle) -> None:
        """Do nothing: cancelled timers are dropped when they are due."""

    def _process_events(self, event_list: Any) -> None:
        """Do nothing: there are no sockets."""

    def _run_once(self) -> None:
        ready, timers = self._ready, self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not ready and not self._stopping:
            if not timers:
                raise DeadlockError("no timer is set and no task can continue")
            self.now_s = max(self.now_s, timers[0][0])
        while timers and timers[0][0] <= self.now_s:
            handle: events.Handle = heapq.heappop(timers)[2]
            process = handle._context.get(_current)  # type: ignore[attr-defined]
            if process is not None and process.paused:
                process.waiting_timers.append(handle)
            else:
                ready.append(handle)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle.cancelled():
                continue
            process = handle._context.get(_current)  # type: ignore[attr-defined]
            if process is not None and process.paused:
                process.waiting.append(handle)
            else:
                handle._run()

    _stopping: bool


def current_process() -> Process | None:
    return _current.get()
