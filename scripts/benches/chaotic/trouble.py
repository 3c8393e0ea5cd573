"""Kills, stops and corrupts engines while they read from each other."""

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

from harness.peer_memory import Poisoner
from harness.report import say

from chaotic.cluster import Victims
from chaotic.counts import Counts
from chaotic.traffic import Traffic

BETWEEN_S = (0.8, 2.5)
INTO_THE_READ_S = 0.03
"""A read takes from 3 to 30 ms, so the disturbance comes before, during or after it."""
DEAD_FOR_S = 1.0
STOPPED_S = (0.4, 1.2)
"""Longer than the lease."""
FEWEST = 2
"""Engines that must be up before one is disturbed: a reader needs an owner."""
KILL_OF_FEWEST = 0.2
"""Probability that one of only ``FEWEST`` engines is killed, so that no owner is left."""

Disturbance = Callable[[str, str, str], Awaitable[None]]


class Trouble:
    """``make`` disturbs engines until its event is set, and then waits for restarts and requests that it began."""

    def __init__(self, victims: Victims, traffic: Traffic, poisoner: Poisoner, rng: Random, counts: Counts) -> None:
        self._victims = victims
        self._traffic = traffic
        self._poisoner = poisoner
        self._rng = rng
        self._counts = counts
        self._tasks: asyncio.TaskGroup

    async def make(self, until: asyncio.Event) -> None:
        killing: list[Disturbance] = [self._kill_owner, self._kill_reader]
        # Poisoning is chosen more often because it needs no restart.
        harmless: list[Disturbance] = [self._stop_owner, self._stop_reader, *[self._poison] * 3]
        async with asyncio.TaskGroup() as self._tasks:
            while not until.is_set():
                await asyncio.sleep(self._rng.uniform(*BETWEEN_S))
                self._victims.note_crashes()
                pairs, up = self._victims.pairs(), len(self._victims.usable)
                if until.is_set() or up < FEWEST:
                    continue
                if not pairs:
                    self._restart_corrupted()
                    continue
                may_kill = up > FEWEST or self._rng.random() < KILL_OF_FEWEST
                disturbance = self._rng.choice([*killing, *harmless] if may_kill else harmless)
                await disturbance(*self._rng.choice(pairs))

    def _restart_corrupted(self) -> None:
        """Kill the engine with the most corrupted copies, because other engines cannot read corrupted copies."""
        damaged = [owner for owner, _ in self._victims.poisoned if owner in self._victims.usable]
        if damaged:
            self._kill(max(sorted(set(damaged)), key=damaged.count))
            self._counts.owners_killed += 1

    async def _kill_owner(self, owner: str, reader: str, adapter: str) -> None:
        await self._read_begins(reader, adapter)
        self._kill(owner)
        self._counts.owners_killed += 1

    async def _kill_reader(self, owner: str, reader: str, adapter: str) -> None:
        await self._read_begins(reader, adapter)
        self._kill(reader)
        self._counts.readers_killed += 1

    async def _stop_owner(self, owner: str, reader: str, adapter: str) -> None:
        await self._read_begins(reader, adapter)
        await self._victims.stop_for(owner, self._rng.uniform(*STOPPED_S))
        self._counts.owners_stopped += 1

    async def _stop_reader(self, owner: str, reader: str, adapter: str) -> None:
        await self._read_begins(reader, adapter)
        await self._victims.stop_for(reader, self._rng.uniform(*STOPPED_S))
        self._counts.readers_stopped += 1

    async def _poison(self, owner: str, reader: str, adapter: str) -> None:
        """Corrupt a copy that no request of its owner uses, and do not request it there until the owner restarts.

        Only readers verify a copy. The owner's own output with it would be wrong.
        """
        if self._traffic.may_run(owner, adapter):
            return
        self._victims.poisoned.add((owner, adapter))
        places = [self._rng.random() for _ in range(3)]
        done = await self._victims.poison(self._poisoner, owner, adapter, places)
        if done is None:
            # Another adapter, which the owner may run, may have been corrupted instead.
            self._kill(owner)
        elif done:
            self._counts.poisonings += 1
            self._ask(reader, adapter)
        else:
            self._victims.poisoned.discard((owner, adapter))

    async def _read_begins(self, reader: str, adapter: str) -> None:
        self._ask(reader, adapter)
        await asyncio.sleep(self._rng.uniform(0.0, INTO_THE_READ_S))

    def _ask(self, reader: str, adapter: str) -> None:
        self._tasks.create_task(self._traffic.serve_for(adapter, reader))

    def _kill(self, name: str) -> None:
        if name in self._victims.usable:
            self._victims.kill(name)
            self._tasks.create_task(self._victims.restart(name, self._rng.uniform(0.0, DEAD_FOR_S)))


def progress(counts: Counts, seconds: float) -> None:
    kills = counts.owners_killed + counts.readers_killed
    say(
        f"{seconds:.0f} s: {counts.requests} requests, {kills} kills, "
        f"{counts.poisonings} poisonings, {sum(counts.faults().values())} faults"
    )
