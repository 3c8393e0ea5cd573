"""Where a process listens and where its peers reach it, from the templates of BusConfig."""

import os
import tempfile
from pathlib import Path

import msgspec

from loraserve.config import Config
from loraserve.errors import ConfigError

IPC = "ipc://"
# sockaddr_un holds 108 bytes on Linux and 104 on macOS, with the final zero.
LONGEST_IPC_PATH = 100


class Addresses(msgspec.Struct, frozen=True):
    """ZeroMQ endpoints of one process."""

    inbox: str
    publications: str
    bind_inbox: str
    bind_publications: str

    @property
    def on_this_machine(self) -> bool:
        return self.bind_inbox.startswith(IPC) or self.bind_publications.startswith(IPC)


def run_dir(config: Config) -> Path:
    """The cluster's private folder for sockets and locks; one per user where the configuration names none."""
    named = config.cluster.run_dir
    return Path(named) if named else Path(tempfile.gettempdir()) / f"loraserve-{os.getuid()}"


def addresses(config: Config, name: str) -> Addresses:
    """Raises ConfigError for a template or path that cannot be used."""
    bus = config.bus
    inbox, publications = _fill(bus.connect, config, name), _fill(bus.connect_pub, config, name)
    if name in bus.peers:
        inbox, comma, publications = bus.peers[name].partition(",")
        if not comma:
            raise ConfigError(f"bus.peers.{name}: write 'inbox address,publications address'")
    found = Addresses(
        _checked(inbox.strip(), "bus.connect"),
        _checked(publications.strip(), "bus.connect_pub"),
        _checked(_fill(bus.bind, config, name) or inbox.strip(), "bus.bind"),
        _checked(_fill(bus.bind_pub, config, name) or publications.strip(), "bus.bind_pub"),
    )
    if found.inbox == found.publications:
        raise ConfigError(f"bus.connect and bus.connect_pub are both {found.inbox} for {name}; give each its own")
    return found


def _fill(template: str, config: Config, name: str) -> str:
    return template.replace("{name}", name).replace("{run_dir}", str(run_dir(config)))


def _checked(address: str, field: str) -> str:
    if address.startswith(IPC):
        path = address.removeprefix(IPC)
        if len(os.fsencode(path)) > LONGEST_IPC_PATH:
            raise ConfigError(
                f"{field}: the socket path {path} is longer than {LONGEST_IPC_PATH} bytes; "
                "set cluster.run_dir to a shorter folder"
            )
        if not path.startswith("/"):
            raise ConfigError(f"{field}: {address} is not an absolute path; set cluster.run_dir to an absolute folder")
        return address
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if not (address.startswith("tcp://") and host and colon and port.isdigit()):
        raise ConfigError(f"{field}: {address!r} is neither ipc:///path nor tcp://host:port")
    return address
