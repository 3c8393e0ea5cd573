"""Memory that other processes of this user can map, and that is gone when its last user is, whatever it died of.

It is a memfd, which peers open as /proc/PID/fd/N. A file in /dev/shm would outlive a kill -9, so that somebody had to
sweep it up at a start that may never come; this has no name in any folder and the kernel frees it. The price: both
processes must be in one PID namespace (containers: `pid: service:...`), else `choose` takes another transport.
"""

import fcntl
import mmap
import os
import secrets
import weakref

from loraserve.errors import ConfigError

NAME = "loraserve-"
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SEAL") else 0
"""Nobody, its owner neither, can shorten it: a reader's copy can never run into pages that are no more (SIGBUS)."""


def supported() -> bool:
    """Whether this machine has all that the transport needs."""
    try:
        os.close(os.pidfd_open(os.getpid()))
        os.close(os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    except (AttributeError, OSError):
        return False
    return SEALS != 0 and os.path.isdir("/proc/self/fd")


def link_text(name: str) -> str:
    """What the link /proc/PID/fd/N of a memory of this name says."""
    return f"/memfd:{name} (deleted)"


class SharedMemory:
    """Zeroed; pages are taken when they are first written, as of any memory. To have them all at once is no check of
    whether there are enough: the kernel goes on until it must kill somebody."""

    def __init__(
        self, length_bytes: int, remedy: str = "lower engine.pool_bytes or take shm out of transfer.transports"
    ) -> None:
        self.name = NAME + secrets.token_hex(16)
        self.length_bytes = length_bytes
        descriptor = os.memfd_create(self.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(descriptor, 0o600)
            os.ftruncate(descriptor, length_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            self.view = memoryview(mmap.mmap(descriptor, length_bytes))
        except (OSError, ValueError, OverflowError) as error:
            os.close(descriptor)
            raise ConfigError(f"{length_bytes} bytes of shared memory cannot be had: {error}; {remedy}") from error

        self._descriptor = descriptor
        # Also of one that is forgotten.
        self._closed = weakref.finalize(self, os.close, descriptor)

    def export(self) -> int:
        """One more descriptor of it, for peers; whoever asked closes it."""
        return os.dup(self._descriptor)

    def close(self) -> None:
        """Repeating changes nothing. The bytes are there until the last view of them goes."""
        self._descriptor = -1
        self._closed()
