"""Kills, stops and poisons engines while they read from each other, again and again."""

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
"""A read and its check take from 3 to 30 ms: the blow falls before, in or after them."""
DEAD_FOR_S = 1.0
STOPPED_S = (0.4, 1.2)
"""Longer than a lease lasts."""
FEWEST = 2
"""As many engines are up as reading takes, before anything is done to one."""
KILL_OF_FEWEST = 0.2
"""How often one of so few is killed, so that nobody is left to read from."""

Deed = Callable[[str, str, str], Awaitable[None]]


class Trouble:
    """``make`` goes on until it is told to stop; what it began it ends."""

    def __init__(self, victims: Victims, traffic: Traffic, poisoner: Poisoner, rng: Random, counts: Counts) -> None:
        self._victims = victims
        self._traffic = traffic
        self._poisoner = poisoner
        self._rng = rng
        self._counts = counts
        self._tasks: asyncio.TaskGroup

    async def make(self, until: asyncio.Event) -> None:
        killing: list[Deed] = [self._kill_owner, self._kill_reader]
        # Poisoning more often: nobody has to start anew for it.
        sparing: list[Deed] = [self._stop_owner, self._stop_reader, *[self._poison] * 3]
        async with asyncio.TaskGroup() as self._tasks:
            while not until.is_set():
                await asyncio.sleep(self._rng.uniform(*BETWEEN_S))
                self._victims.note_crashes()
                pairs, up = self._victims.pairs(), len(self._victims.usable)
                if until.is_set() or up < FEWEST:
                    continue
                if not pairs:
                    self._start_anew()
                    continue
                may_kill = up > FEWEST or self._rng.random() < KILL_OF_FEWEST
                deed = self._rng.choice([*killing, *sparing] if may_kill else sparing)
                await deed(*self._rng.choice(pairs))

    def _start_anew(self) -> None:
        """Copies that were damaged stay so until then, and at last there are no others."""
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
        """A copy that its owner does not run now, and is not asked for any more before its next start: its own tokens
        would be wrong, and nobody claims that they are not."""
        if (owner, adapter) in self._traffic.at:
            return
        self._victims.poisoned.add((owner, adapter))
        places = [self._rng.random() for _ in range(3)]
        done = await self._victims.poison(self._poisoner, owner, adapter, places)
        if done is None:
            # It may have hit something else, which the owner may run.
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
        f"{seconds:.0f} s: {counts.requests} requests, {counts.resubmitted} sent again, {kills} kills, "
        f"{counts.poisonings} poisonings, {sum(counts.faults().values())} faults"
    )
