"""A switch between virtual hosts that loses and delays IP packets: ``python -m loraserve.benchmarks.hosts.switch``.

It runs as a process of its own, so that the load generator does not delay packets. Each host has a TUN device, whose
descriptor the switch inherits. It reads the packets of each host, decides with ``Links`` what happens to them, and
writes them to the device of the host that has the destination address. Rules arrive as lines of JSON on stdin; each is
answered with a line. The switch ends when stdin closes, so it never outlives the process that started it.
"""

import json
import os
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from random import Random

import msgspec

READ_BYTES = 65_536
BURST_PACKETS = 64
"""Most packets read from one device before the others have their turn."""
IPV4 = 4
QUEUE_PACKETS = 10_000
"""Most packets of one direction that wait for their delay. A real link drops further packets too."""


class Rule(msgspec.Struct, frozen=True):
    """What happens to the packets from one host to another. ``loss`` is a probability; 1 is a cut link."""

    loss: float = 0.0
    delay_s: float = 0.0


class Change(msgspec.Struct, frozen=True):
    """Sets the rule of the packets from host number ``source`` to host number ``target``."""

    source: int
    target: int
    rule: Rule


class Links:
    """The rules of all directions, and the packets that wait for their delay. Pure: time and randomness are passed.

    Packets of one direction stay in order, because a real link of constant delay keeps them in order.
    """

    def __init__(self, addresses: Sequence[bytes], rng: Random) -> None:
        self.dropped = 0
        self.forwarded = 0
        self._targets = {address: number for number, address in enumerate(addresses)}
        self._rules: dict[tuple[int, int], Rule] = {}
        self._waiting: dict[tuple[int, int], deque[tuple[float, bytes]]] = {}
        self._rng = rng

    def set_rule(self, change: Change) -> None:
        """Replace a rule. Packets that already wait keep their delay, except that a cut link loses them."""
        direction = change.source, change.target
        self._rules[direction] = change.rule
        if change.rule.loss >= 1.0:
            self.dropped += len(self._waiting.pop(direction, ()))

    def receive(self, source: int, packet: bytes, now: float) -> int | None:
        """Return the number of the host to forward a packet to now, or None if it is dropped or must wait."""
        target = self._targets.get(packet[16:20]) if packet[0] >> 4 == IPV4 else None
        if target is None:
            return None
        direction = source, target
        rule = self._rules.get(direction, FAST)
        if rule.loss and self._rng.random() < rule.loss:
            self.dropped += 1
            return None
        queue = self._waiting.get(direction)
        if not rule.delay_s and not queue:
            self.forwarded += 1
            return target
        if queue is None:
            queue = self._waiting[direction] = deque()
        if len(queue) >= QUEUE_PACKETS:
            self.dropped += 1
        else:
            queue.append((max(now + rule.delay_s, queue[-1][0] if queue else 0.0), packet))
        return None

    def take_due(self, now: float) -> list[tuple[int, bytes]]:
        """Return the packets whose delay is over, with the numbers of their hosts."""
        due = []
        for (_, target), queue in self._waiting.items():
            while queue and queue[0][0] <= now:
                due.append((target, queue.popleft()[1]))
        self.forwarded += len(due)
        return due

    def next_due_s(self) -> float | None:
        """Return when the next packet's delay is over; None if no packet waits."""
        return min((queue[0][0] for queue in self._waiting.values() if queue), default=None)


FAST = Rule()


def forward(links: Links, devices: Sequence[int], commands: int) -> None:
    """Forward packets between the devices until ``commands`` reaches its end."""
    poll = select.poll()
    numbers = {device: number for number, device in enumerate(devices)}
    for descriptor in (*devices, commands):
        os.set_blocking(descriptor, descriptor == commands)
        poll.register(descriptor, select.POLLIN)
    pending = b""
    while True:
        for descriptor, _ in poll.poll(_timeout_ms(links)):
            if descriptor != commands:
                _read_packets(links, devices, numbers[descriptor])
                continue
            read = os.read(commands, READ_BYTES)
            if not read:
                return
            *lines, pending = (pending + read).split(b"\n")
            for line in lines:
                _obey(links, line)
        for target, packet in links.take_due(time.monotonic()):
            _write(devices[target], packet)


def _read_packets(links: Links, devices: Sequence[int], source: int) -> None:
    for _ in range(BURST_PACKETS):
        try:
            packet = os.read(devices[source], READ_BYTES)
        except BlockingIOError:
            return
        target = links.receive(source, packet, time.monotonic())
        if target is not None:
            _write(devices[target], packet)


def _write(device: int, packet: bytes) -> None:
    try:
        os.write(device, packet)
    except BlockingIOError:
        # The queue of the device is full. A real link drops the packet too.
        return


def _obey(links: Links, line: bytes) -> None:
    for change in msgspec.json.decode(line, type=list[Change]):
        links.set_rule(change)
    print(json.dumps({"forwarded": links.forwarded, "dropped": links.dropped}), flush=True)


def _timeout_ms(links: Links) -> float | None:
    due_s = links.next_due_s()
    return None if due_s is None else max(0.0, (due_s - time.monotonic()) * 1000.0)


def main(arguments: Sequence[str]) -> int:
    """Run the switch. The only argument is JSON: the seed, and each host's address with its device's descriptor."""
    settings: Mapping[str, int] = json.loads(arguments[0])
    seed = settings["seed"]
    hosts = {name: device for name, device in settings.items() if name != "seed"}
    links = Links([socket.inet_aton(address) for address in hosts], Random(seed))
    print("{}", flush=True)
    forward(links, list(hosts.values()), sys.stdin.fileno())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
