"""The addresses of a process on the bus, and the lock that reserves its name on this machine."""

import fcntl
import os
import stat
import tempfile
from pathlib import Path
from types import TracebackType

import msgspec

from loraserve.config import Config
from loraserve.errors import ConfigError

IPC = "ipc://"
# sockaddr_un holds 108 bytes on Linux and 104 on macOS, including the final zero.
LONGEST_IPC_PATH = 100


class Addresses(msgspec.Struct, frozen=True):
    """The ZeroMQ addresses to which peers of a process connect and those that the process binds."""

    inbox: str
    publications: str
    bind_inbox: str
    bind_publications: str

    @property
    def on_this_machine(self) -> bool:
        return self.bind_inbox.startswith(IPC) or self.bind_publications.startswith(IPC)

    @property
    def unprotected(self) -> tuple[str, ...]:
        """Return the TCP addresses that the process binds. Any host that can connect to them can send it messages."""
        return tuple(address for address in (self.bind_inbox, self.bind_publications) if not address.startswith(IPC))


def run_dir(config: Config) -> Path:
    """Return the private folder for sockets and locks: ``cluster.run_dir``, or one folder per user if that is ""."""
    named = config.cluster.run_dir
    return Path(named) if named else Path(tempfile.gettempdir()) / f"loraserve-{os.getuid()}"


def resolve_addresses(config: Config, name: str) -> Addresses:
    """Return the addresses of the process ``name``. Raises ConfigError for an invalid template or path."""
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


def make_private_dir(path: Path) -> Path:
    """Create the folder with mode 0700. Raises ConfigError if another user owns it or can access it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigError(f"cluster.run_dir {path}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"cluster.run_dir {path} is not a folder; set it to another path")
    if found.st_uid != os.getuid():
        raise ConfigError(f"cluster.run_dir {path} belongs to user id {found.st_uid}; set it to a folder of your own")
    if found.st_mode & 0o077:
        raise ConfigError(
            f"cluster.run_dir {path} has mode {stat.S_IMODE(found.st_mode):04o}, so others could talk to the cluster; "
            f"run: chmod 700 {path}"
        )
    return path


class NameClaim:
    """A lock on ``<run_dir>/<name>.lock`` for the life of a process. The kernel releases it even after a crash."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self._path = make_private_dir(run_dir) / f"{name}.lock"
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._descriptor)
            raise ConfigError(
                f"a process named {name} already runs in {run_dir} (pid {holder}); stop it, or use another --name "
                "or cluster.run_dir"
            ) from error
        os.truncate(self._descriptor, 0)
        os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Release the lock. The file stays: if it were deleted, two processes could each lock a file of this name."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "NameClaim":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()
