"""The base class of every process: three hooks (``start``, ``loops``, ``drain``) and a message handler.

STARTING  ``start(stack)`` acquires resources. One-way messages are queued. Requests except Ping are refused.
READY     The coroutines of ``loops()`` run, and ``handle`` is called for each message.
DRAINING  After ``stop()``, ``drain()`` finishes current work. Loops and ``handle`` continue to run.
STOPPED   Loops and spawned tasks are cancelled, and the stack is closed.
"""

import asyncio
import os
from collections import deque
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from contextvars import ContextVar
from enum import StrEnum
from types import UnionType
from typing import Any, ClassVar

from loraserve.bus.protocol import Bus, Envelope
from loraserve.clock import Clock, unix_offset_s
from loraserve.config import Config
from loraserve.errors import AdapterError, LoraServeError, PeerError, RequestTimeoutError
from loraserve.log import get_logger
from loraserve.messages import PROTOCOL_VERSION, Ping, Pong, StoryTold, TellStory
from loraserve.metrics import Metrics
from loraserve.story import Story

_handling: ContextVar[Envelope | None] = ContextVar("handling", default=None)


class ServiceState(StrEnum):
    STARTING = "STARTING"
    READY = "READY"
    DRAINING = "DRAINING"
    STOPPED = "STOPPED"


class Service:
    """Base class of every process kind. Subclasses set ``inbox`` and override the hooks.

    If ``handle`` raises, the service logs the error, refuses the message and continues. If a loop raises, the process
    ends and the supervisor starts a new process.
    """

    inbox: ClassVar[type[Any] | UnionType]
    """The union of the message types that this process kind receives. It includes Ping."""
    drain_timeout_s: float = 10.0
    starting_detail: str = ""
    """A description of the current step of ``start``, returned to pings while the service starts."""

    def __init__(self, config: Config, bus: Bus, clock: Clock) -> None:
        self.config = config
        self.bus = bus
        self.clock = clock
        self.log = get_logger(type(self).__module__)
        self.story = Story()
        self.metrics = Metrics()
        self.metrics.watch_bus(bus.counters)
        self._state = ServiceState.STARTING
        self._stopping = asyncio.Event()
        self._start_scope: asyncio.Timeout | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._held: deque[Envelope] = deque(maxlen=config.bus.queue_messages)

    async def start(self, stack: AsyncExitStack) -> None:
        """Acquire the service's resources. The service exits the context managers on ``stack`` when it stops."""

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """Return coroutines that run from READY to STOPPED. A loop may return. If it raises, the process ends."""
        return []

    async def drain(self) -> None:
        """Finish current work while ``handle`` and the loops continue to run. Cancelled after ``drain_timeout_s``."""

    async def handle(self, envelope: Envelope) -> None:
        """Handle one message. Later messages wait for this call, so ``spawn`` work that awaits other processes."""

    def is_ready(self) -> bool:
        """Return whether a started service can serve. While this is False, ``state`` is STARTING."""
        return True

    def ready_detail(self) -> str:
        """Describe what a started service contains or waits for, for the answers to pings."""
        return ""

    def story_subjects(self, subjects: Sequence[str]) -> Sequence[str]:
        """Return the subjects under which this process records the events of ``subjects``."""
        return subjects

    @property
    def state(self) -> ServiceState:
        if self._state is ServiceState.READY and not self.is_ready():
            return ServiceState.STARTING
        return self._state

    def stop(self) -> None:
        """Begin to stop. Further calls have no effect."""
        self._stopping.set()
        if self._start_scope is not None and not self._start_scope.expired():
            self._start_scope.reschedule(0.0)

    def spawn(self, work: Coroutine[Any, Any, None], envelope: Envelope | None = None) -> None:
        """Run ``work`` concurrently with the handling of messages. It is cancelled when the service stops.

        An error of ``work`` is logged, and the request in ``envelope`` (default: the one being handled) is refused.
        """
        if self._tasks is None and self._state is ServiceState.STARTING:
            work.close()
            raise RuntimeError(f"{self.bus.name} does not run yet, so it cannot spawn work")
        guarded = self._guard(work, envelope or _handling.get())
        if not self._create(guarded):
            guarded.close()
            work.close()

    def spawn_vital(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that is essential to the service: if it raises, the process ends."""
        if not self._create(work):
            work.close()

    async def run(self) -> None:
        """Run from STARTING to STOPPED. Raises the error of ``start`` or of a loop, if any."""
        self.log.info("starting", pid=os.getpid(), incarnation=self.bus.incarnation)
        try:
            async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                await self._live(stack)
                self._cancel_all()
        except BaseExceptionGroup as group:
            raise _single(group) from None
        finally:
            self._tasks = None
            self._state = ServiceState.STOPPED
            self.log.info("stopped")

    async def _live(self, stack: AsyncExitStack) -> None:
        self._create(self._read_inbox())
        if not await self._start_unless_stopped(stack):
            return
        while self._held:
            await self._dispatch(self._held.popleft())
        self._state = ServiceState.READY
        self.log.info("started", detail=self.ready_detail())
        for loop in self.loops():
            self._create(loop)
        await self._stopping.wait()
        self._state = ServiceState.DRAINING
        self.log.info("draining")
        try:
            async with asyncio.timeout(self.drain_timeout_s):
                await self.drain()
        except TimeoutError:
            self.log.warning("drain_cut_short", after_s=self.drain_timeout_s)

    async def _start_unless_stopped(self, stack: AsyncExitStack) -> bool:
        """Run ``start`` and return whether it completed. A call of ``stop`` cancels ``start``.

        ``start`` runs in the current task, because a task must exit the context managers that it entered.
        """
        try:
            async with asyncio.timeout(None) as scope:
                self._start_scope = scope
                if self._stopping.is_set():
                    return False
                await self.start(stack)
        except TimeoutError:
            if not scope.expired():
                raise
            return False
        finally:
            self._start_scope = None
        return True

    async def _read_inbox(self) -> None:
        while True:
            envelope = await self.bus.receive()
            if isinstance(envelope.message, Ping):
                self.bus.respond(envelope, self._pong())
            elif self._state is not ServiceState.STARTING:
                await self._dispatch(envelope)
            elif envelope.reply_to:
                self.bus.refuse(envelope, "starting", f"{self.bus.name} is starting; ask again")
            else:
                self._held.append(envelope)

    async def _dispatch(self, envelope: Envelope) -> None:
        token = _handling.set(envelope)
        try:
            tells_story = isinstance(envelope.message, TellStory)
            await self._guard(self._tell_story(envelope) if tells_story else self.handle(envelope), envelope)
        finally:
            _handling.reset(token)

    async def _tell_story(self, envelope: Envelope) -> None:
        lines = self.story.told(self.story_subjects(envelope.message.subjects), unix_offset_s(self.clock))
        self.bus.respond(envelope, StoryTold(lines=lines))

    async def _guard(self, work: Coroutine[Any, Any, None], envelope: Envelope | None) -> None:
        try:
            await work
        except Exception as error:
            code = _code(error)
            expected = isinstance(error, LoraServeError)
            log = self.log.warning if expected else self.log.error
            log(
                "work_failed",
                code=code,
                reason=str(error),
                message=type(envelope.message).__name__ if envelope else None,
                sender=envelope.sender if envelope else None,
                exc_info=not expected,
            )
            if envelope is not None:
                self.bus.refuse(envelope, code, str(getattr(error, "message", error)) or type(error).__name__)

    def _pong(self) -> Pong:
        return Pong(
            name=self.bus.name,
            state=self.state,
            incarnation=self.bus.incarnation,
            pid=os.getpid(),
            protocol=PROTOCOL_VERSION,
            detail=self.starting_detail if self._state is ServiceState.STARTING else self.ready_detail(),
        )

    def _create(self, work: Coroutine[Any, Any, None]) -> bool:
        """Create a task for ``work``, unless the service is ending. Return whether the task was created."""
        if self._tasks is None:
            return False
        try:
            task = self._tasks.create_task(work)
        except RuntimeError:
            # A loop raised, and the task group is shutting down.
            return False
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return True

    def _cancel_all(self) -> None:
        # Cancelled tasks must not spawn work now, because it would not be cancelled.
        self._tasks = None
        self._state = ServiceState.STOPPED
        for task in self._running:
            task.cancel()


def _code(error: Exception) -> str:
    match error:
        case PeerError() | AdapterError():
            return error.code
        case RequestTimeoutError():
            return "timeout"
        case LoraServeError():
            return "refused"
        case _:
            return "internal"


def _single(error: BaseException) -> BaseException:
    """Return the only error in a group, or the group if it contains several errors."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
