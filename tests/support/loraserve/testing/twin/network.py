"""The network of the twin: it loses, doubles and delays messages, and can be cut between any two processes."""

from collections.abc import Callable
from contextvars import Context
from random import Random
from typing import Any
from zlib import crc32

from loraserve.testing.memory_bus import MemoryNetwork
from loraserve.testing.twin.processes import Process, ProcessLoop
from loraserve.testing.twin.schedule import Cut, Disturb

OUTSIDE = Context()
"""The context of callbacks that belong to no process."""


class TwinNetwork(MemoryNetwork):
    """A MemoryNetwork that knows the processes, so that deliveries do not run as a part of the sender."""

    def __init__(self, loop: ProcessLoop) -> None:
        super().__init__()
        self._loop = loop
        self.trace = 0
        """A checksum of all messages and their times, to compare runs."""
        self.processes: dict[str, Process] = {}
        self._cuts: dict[tuple[str, str], int] = {}
        self._disturbed: dict[tuple[str, str], tuple[Disturb, Random]] = {}
        self._unnoticed: list[tuple[str, str]] = []
        """(observer, ended process): the observer was cut off, so it learns of the end when the link is back."""

    def cut(self, cut: Cut) -> None:
        for link in _links(cut):
            self._cuts[link] = self._cuts.get(link, 0) + 1

    def mend(self, cut: Cut) -> None:
        for link in _links(cut):
            self._cuts[link] -= 1
        unnoticed, self._unnoticed = self._unnoticed, []
        for observer, ended in unnoticed:
            self._tell_lost(observer, ended)

    def disturb(self, disturb: Disturb) -> None:
        self._disturbed[disturb.sender, disturb.receiver] = disturb, Random(disturb.seed)

    def calm(self, disturb: Disturb) -> None:
        if self._disturbed.get((disturb.sender, disturb.receiver), (None,))[0] is disturb:
            del self._disturbed[disturb.sender, disturb.receiver]

    def kill(self, name: str) -> None:
        self._buses.pop(name).die()
        for observer in list(self._buses):
            self._tell_lost(observer, name)
        for subscribers in self._subscribers.values():
            subscribers[:] = [bus for bus in subscribers if bus.name != name]
        self._backlogs = {pair: backlog for pair, backlog in self._backlogs.items() if pair[0] != name}

    def close(self) -> None:
        """Cut off all processes at once. None learns of the end of another."""
        for bus in self._buses.values():
            bus.die()
        self._buses.clear()

    def carry(self, sender: str, receiver: str, message: Any, deliver: Callable[[], None]) -> None:
        link = sender, receiver
        self.trace = crc32(f"{self._loop.now_s} {sender} {receiver} {type(message).__name__}".encode(), self.trace)
        if self._cuts.get(link):
            return
        delay_s, copies = 0.0, 1
        if link in self._disturbed:
            disturb, rng = self._disturbed[link]
            if rng.random() < disturb.share:
                copies = {"lose": 0, "double": 2, "delay": 1}[disturb.kind]
                delay_s = disturb.delay_s * rng.random()
        for _ in range(copies):
            self._deliver_at(link, delay_s, deliver)

    def _deliver_at(self, link: tuple[str, str], delay_s: float, deliver: Callable[[], None]) -> None:
        """Deliver in the order of sending for each pair of processes."""
        now, last_s = self._loop.now_s, self._last_due_s.get(link, 0.0)
        if delay_s <= 0 and last_s <= now:
            deliver()
            return
        due_s = max(now + delay_s, last_s + 1e-6)
        self._last_due_s[link] = due_s
        self._loop.call_at(due_s, deliver, context=OUTSIDE)

    def _tell_lost(self, observer: str, ended: str) -> None:
        bus = self._buses.get(observer)
        if self._cuts.get((observer, ended)) or self._cuts.get((ended, observer)):
            self._unnoticed.append((observer, ended))
        elif bus is not None:
            self.processes[observer].call(bus.lost, ended)


def _links(cut: Cut) -> list[tuple[str, str]]:
    links = [(cut.process, other) for other in cut.others]
    return [*links, *((other, cut.process) for other in cut.others)] if cut.both_ways else links
