"""The engines of a chaos run: which are up, which copies are corrupted and which shared memory they own."""

import asyncio
import signal
from collections.abc import Mapping, Sequence

from harness.driver import Driver
from harness.engines import Engines
from harness.peer_memory import Poisoner, held_by, left_of, mapped_by

from chaotic.counts import Counts
from loraserve.messages import AdapterRef

ENGINES = ("engine-0", "engine-1", "engine-2")
RELEASE_TIMEOUT_S = 10.0


class Victims:
    """``usable``: names of engines that are up. ``poisoned``: (engine, adapter) pairs that must not be requested."""

    def __init__(self, engines: Engines, driver: Driver, adapters: Mapping[str, AdapterRef], counts: Counts) -> None:
        self.adapters = adapters
        self.usable: set[str] = set()
        self.poisoned: set[tuple[str, str]] = set()
        self._engines = engines
        self._driver = driver
        self._counts = counts
        self._memory: dict[str, set[str]] = {}
        """By engine, the shared memory that it owned when it was ready, before it read anything."""
        self._every: set[str] = set()

    async def start(self, name: str) -> None:
        """Start an engine and return when it is ready."""
        self._engines.start(name)
        await self._driver.ready(name)
        self._memory[name] = held_by(self._engines.pid(name))
        self._every |= self._memory[name]
        self.poisoned = {copy for copy in self.poisoned if copy[0] != name}
        self.usable.add(name)

    async def spread(self) -> None:
        """Load each adapter on one engine, from which the others can read it."""
        for number, name in enumerate(ENGINES):
            await self._driver.hold(name, list(self.adapters.values())[number :: len(ENGINES)])
            await self._driver.unpin(name)
            await self._driver.fresh_load(name)

    def kill(self, name: str) -> None:
        self.usable.discard(name)
        self._engines.kill(name)

    async def restart(self, name: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await self.start(name)
        self._counts.restarts += 1

    async def stop_for(self, name: str, seconds: float) -> None:
        """Suspend an engine for a while. A suspended engine neither reads nor answers."""
        self._engines.send(name, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        self._engines.send(name, signal.SIGCONT)

    async def poison(self, poisoner: Poisoner, owner: str, adapter: str, places: Sequence[float]) -> bool | None:
        """Corrupt a copy in an engine's pool. See Poisoner."""
        return await poisoner.poison(owner, self._engines.pid(owner), self.adapters[adapter], places)

    def askable(self, adapter: str) -> list[str]:
        return sorted(name for name in self.usable if (name, adapter) not in self.poisoned)

    def pairs(self) -> list[tuple[str, str, str]]:
        """Return (owner, possible reader, adapter) for all copies, from the engines' last load reports."""
        held = {name: self._held(name) for name in sorted(self.usable)}
        return [
            (owner, reader, adapter)
            for owner, adapters in held.items()
            for reader in held
            for adapter in sorted(adapters - held[reader])
            if reader != owner and not {(owner, adapter), (reader, adapter)} & self.poisoned
        ]

    def note_crashes(self) -> None:
        """Count engines that ended without being killed."""
        for name in self.usable - self._engines.pids().keys():
            self.usable.discard(name)
            self._counts.crashed_engines += 1
            self._counts.note(f"{name} ended by itself")

    async def count_mapped_of_dead(self) -> None:
        """Count the shared memory of dead engines that living ones still have mapped after ``RELEASE_TIMEOUT_S``."""
        own = {memory for name in self.usable for memory in self._memory[name]}
        pids = [self._engines.pid(name) for name in self.usable]
        for _ in range(int(RELEASE_TIMEOUT_S / 0.2)):
            left = {memory for pid in pids for memory in held_by(pid) | mapped_by(pid)} - own
            if not left:
                return
            await asyncio.sleep(0.2)
        self._counts.leaked_memfds += len(left)
        self._counts.note(f"{len(left)} shared memories of dead engines are still mapped")

    def count_left_behind(self) -> None:
        """Count the shared memory that is left after all processes have ended."""
        left = left_of(self._every)
        self._counts.leaked_memfds += len(left)
        if left:
            self._counts.note(f"shared memory that outlives the run: {sorted(left)}")

    def _held(self, name: str) -> set[str]:
        load = self._driver.loads.get(name)
        return {each.name for each in load.adapters.resident} if load is not None else set()
