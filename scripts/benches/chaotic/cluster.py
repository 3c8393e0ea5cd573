"""The engines of a chaos run: who can be asked, which copies are poisoned, and what memory is whose."""

import asyncio
import signal
from collections.abc import Mapping, Sequence

from harness.driver import Driver
from harness.engines import Engines
from harness.peer_memory import Poisoner, held_by, left_of, mapped_by

from chaotic.counts import Counts
from loraserve.messages import AdapterRef

ENGINES = ("engine-0", "engine-1", "engine-2")
LETS_GO_WITHIN_S = 10.0


class Victims:
    """``usable`` engines are up; a copy in ``poisoned`` is one that its own engine must not be asked for."""

    def __init__(self, engines: Engines, driver: Driver, adapters: Mapping[str, AdapterRef], counts: Counts) -> None:
        self.adapters = adapters
        self.usable: set[str] = set()
        self.poisoned: set[tuple[str, str]] = set()
        self._engines = engines
        self._driver = driver
        self._counts = counts
        self._memory: dict[str, set[str]] = {}
        """Of each engine's present life, as it was before it read anything."""
        self._every: set[str] = set()

    async def start(self, name: str) -> None:
        """Returns when it can be asked."""
        self._engines.start(name)
        await self._driver.ready(name)
        self._memory[name] = held_by(self._engines.pid(name))
        self._every |= self._memory[name]
        self.poisoned = {copy for copy in self.poisoned if copy[0] != name}
        self.usable.add(name)

    async def spread(self) -> None:
        """Each adapter to one engine, so that the others can read it there from the beginning."""
        for number, name in enumerate(ENGINES):
            await self._driver.hold(name, list(self.adapters.values())[number :: len(ENGINES)])
            await self._driver.let_go(name)
            await self._driver.fresh_load(name)

    def kill(self, name: str) -> None:
        self.usable.discard(name)
        self._engines.kill(name)
        self._driver.fail_all(name, "killed")

    async def restart(self, name: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await self.start(name)
        self._counts.restarts += 1

    async def stop_for(self, name: str, seconds: float) -> None:
        """It neither reads nor answers meanwhile."""
        self._engines.send(name, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        self._engines.send(name, signal.SIGCONT)

    async def poison(self, poisoner: Poisoner, owner: str, adapter: str, places: Sequence[float]) -> bool | None:
        """See Poisoner."""
        return await poisoner.poison(owner, self._engines.pid(owner), self.adapters[adapter], places)

    def askable(self, adapter: str) -> list[str]:
        return sorted(name for name in self.usable if (name, adapter) not in self.poisoned)

    def pairs(self) -> list[tuple[str, str, str]]:
        """Who owns an adapter, who could read it there, and which: by the engines' last reports."""
        held = {name: self._held(name) for name in sorted(self.usable)}
        return [
            (owner, reader, adapter)
            for owner, adapters in held.items()
            for reader in held
            for adapter in sorted(adapters - held[reader])
            if reader != owner and not {(owner, adapter), (reader, adapter)} & self.poisoned
        ]

    def note_crashes(self) -> None:
        """Those that ended and were not killed."""
        for name in self.usable - self._engines.pids().keys():
            self.usable.discard(name)
            self._driver.fail_all(name, "crashed")
            self._counts.crashed_engines += 1
            self._counts.note(f"{name} ended by itself")

    async def count_mapped_of_dead(self) -> None:
        """Memory of the dead that the living still have mapped after a while."""
        own = {memory for name in self.usable for memory in self._memory[name]}
        pids = [self._engines.pid(name) for name in self.usable]
        for _ in range(int(LETS_GO_WITHIN_S / 0.2)):
            left = {memory for pid in pids for memory in held_by(pid) | mapped_by(pid)} - own
            if not left:
                return
            await asyncio.sleep(0.2)
        self._counts.leaked_memfds += len(left)
        self._counts.note(f"of dead engines {len(left)} memories are still mapped")

    def count_left_behind(self) -> None:
        """Once all processes have ended."""
        left = left_of(self._every)
        self._counts.leaked_memfds += len(left)
        if left:
            self._counts.note(f"memories that outlive the run: {sorted(left)}")

    def _held(self, name: str) -> set[str]:
        load = self._driver.loads.get(name)
        return {each.name for each in load.resident} if load is not None else set()
