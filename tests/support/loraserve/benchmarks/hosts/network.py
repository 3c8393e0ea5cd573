"""Virtual hosts on one machine: a network namespace for each, connected by the switch process of switch.py.

The kernel of this machine may lack netem, so loss and delay are those of the switch. Nothing of the network outlives
the process that made it: namespaces and devices are only referred to by its descriptors.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from loraserve.benchmarks.hosts.switch import Change, Rule
from loraserve.errors import LoraServeError

CLONE_NEWNET = 0x4000_0000
TUNSETIFF = 0x4004_54CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
OWN_NAMESPACE = "/proc/thread-self/ns/net"
NETWORK = "10.77.0"
CUT = Rule(loss=1.0)

_libc = ctypes.CDLL(None, use_errno=True)


class Host:
    """A network namespace with one device. Processes started in ``entered()`` have only this host's network."""

    def __init__(self, name: str, number: int) -> None:
        """Create the namespace and its device. Raises OSError without the privileges."""
        self.name = name
        self.number = number
        self.address = f"{NETWORK}.{number + 1}"
        with _returning():
            _call("unshare", _libc.unshare, CLONE_NEWNET)
            self._namespace = os.open(OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self.device = _open_tun("net0")
                for command in (
                    "link set lo up",
                    f"addr add {self.address}/24 dev net0",
                    "link set net0 up",
                ):
                    subprocess.run(["ip", *command.split()], check=True, capture_output=True)
            except BaseException:
                os.close(self._namespace)
                raise

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Make this host's network the one of the calling thread. Sockets and processes created meanwhile keep it."""
        with _returning():
            _call("setns", _libc.setns, self._namespace, CLONE_NEWNET)
            yield

    def close(self) -> None:
        """Remove the device; the namespace ends with its last process."""
        os.close(self.device)
        os.close(self._namespace)


class VirtualNetwork:
    """Hosts and the switch between them. A context manager: the switch ends with the block."""

    def __init__(self, names: Sequence[str], seed: int = 0) -> None:
        self.hosts: dict[str, Host] = {}
        self._names = names
        self._seed = seed
        self._switch: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "VirtualNetwork":
        try:
            for number, name in enumerate(self._names):
                self.hosts[name] = Host(name, number)
            self._switch = self._start_switch()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the switch, and close the hosts' devices and namespaces."""
        if self._switch is not None:
            assert self._switch.stdin is not None
            assert self._switch.stdout is not None
            self._switch.stdin.close()
            self._switch.wait()
            self._switch.stdout.close()
            self._switch = None
        for host in self.hosts.values():
            host.close()
        self.hosts.clear()

    def set_rule(self, sources: Iterable[str], targets: Iterable[str], rule: Rule) -> None:
        """Set the rule of all packets from one of ``sources`` to one of ``targets``."""
        targets = list(targets)
        self._change(
            [
                Change(self.hosts[source].number, self.hosts[target].number, rule)
                for source in sources
                for target in targets
                if source != target
            ]
        )

    def set_rules_between(self, one: Iterable[str], other: Iterable[str], rule: Rule) -> None:
        """Set the rule of both directions."""
        one, other = list(one), list(other)
        self.set_rule(one, other, rule)
        self.set_rule(other, one, rule)

    def heal(self) -> dict[str, int]:
        """Remove all rules. Returns how many packets the switch ``forwarded`` and ``dropped`` so far."""
        return self._change(
            [Change(one.number, other.number, Rule()) for one in self.hosts.values() for other in self.hosts.values()]
        )

    def _change(self, changes: list[Change]) -> dict[str, int]:
        assert self._switch is not None, "the network is not open"
        assert self._switch.stdin is not None
        self._switch.stdin.write(msgspec.json.encode(changes) + b"\n")
        self._switch.stdin.flush()
        return self._read_line()

    def _start_switch(self) -> "subprocess.Popen[bytes]":
        settings = {"seed": self._seed, **{host.address: host.device for host in self.hosts.values()}}
        self._switch = subprocess.Popen(
            [sys.executable, "-m", "loraserve.benchmarks.hosts.switch", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[host.device for host in self.hosts.values()],
            # Ctrl-C ends the process that started the switch, which then closes it.
            start_new_session=True,
        )
        self._read_line()
        return self._switch

    def _read_line(self) -> dict[str, int]:
        assert self._switch is not None
        assert self._switch.stdout is not None
        line = self._switch.stdout.readline()
        if not line:
            raise LoraServeError(f"the switch between the virtual hosts ended with status {self._switch.wait()}")
        counts: dict[str, int] = json.loads(line)
        return counts


def unusable_reason() -> str:
    """Return why this machine cannot run virtual hosts, in one line; "" if it can."""
    if sys.platform != "linux":
        return "virtual hosts need Linux network namespaces"
    try:
        Host("probe", 0).close()
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr.decode().strip() if isinstance(error, subprocess.CalledProcessError) else error
        return f"virtual hosts need root, /dev/net/tun and the command ip ({detail})"
    return ""


def _open_tun(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _returning() -> Iterator[None]:
    """Return the calling thread to its network namespace at the end of the block."""
    own = os.open(Path(OWN_NAMESPACE), os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        _call("setns", _libc.setns, own, CLONE_NEWNET)
        os.close(own)


def _call(name: str, function: "ctypes._NamedFuncPointer", *arguments: int) -> None:
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
