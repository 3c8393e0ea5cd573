"""Pings the engines that run this gateway's streams but have sent nothing lately.

The monitor knows which engines report to it, but not which of them this gateway reaches: the network may fail between
any two hosts. An engine that answers pings is alive, even if the monitor does not hear it. The streams of an engine
that answers this gateway no more are migrated, even if the monitor hears it.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from loraserve.bus.protocol import Bus
from loraserve.clock import Clock
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.gateway.streams import StreamTable
from loraserve.messages import Ping, Pong

INTERVAL_S = 0.25
FIRST_ANSWER_FACTOR = 4
"""An engine has this many times ``dead_after_s`` for its first answer: the connection to it is opened meanwhile."""


class EngineProbe:
    """Sends the pings and reports the outcomes to the streams. ``spawn`` runs a coroutine concurrently."""

    def __init__(
        self,
        bus: Bus,
        clock: Clock,
        streams: StreamTable,
        dead_after_s: float,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._bus = bus
        self._clock = clock
        self._streams = streams
        self._dead_after_s = dead_after_s
        self._spawn = spawn
        self._asking: set[str] = set()
        self._answered: dict[str, str] = {}
        """The incarnation of each engine that last answered."""

    async def run(self) -> None:
        while True:
            for engine, incarnation in self._streams.quiet_engines(self._clock.monotonic_s()):
                if engine not in self._asking:
                    self._asking.add(engine)
                    self._spawn(self._ask(engine, incarnation))
            await asyncio.sleep(INTERVAL_S)

    async def _ask(self, engine: str, incarnation: str) -> None:
        asked_s = self._clock.monotonic_s()
        is_known = self._answered.get(engine) == incarnation
        timeout_s = self._dead_after_s * (1 if is_known else FIRST_ANSWER_FACTOR)
        try:
            answer = await self._bus.request(engine, Ping(), Pong, timeout_s)
        except (RequestTimeoutError, PeerError):
            # A lost connection ends the wait early. It proves nothing, so the engine is asked again.
            if self._clock.monotonic_s() - asked_s >= self._dead_after_s:
                self._streams.on_no_answer(engine, incarnation, asked_s)
        else:
            self._answered[engine] = answer.incarnation
            if answer.incarnation == incarnation:
                self._streams.watch.note_heard(engine, incarnation, self._clock.monotonic_s())
            else:
                self._streams.on_restarted(engine, incarnation)
        finally:
            self._asking.discard(engine)
