"""A pool in memory that counts its users and lets a test delay them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from loraserve.engine.loading.memory import HostPool


class WatchedPool:
    """A pool that counts concurrent uses.

    ``before_digest`` and ``before_write`` are called in the using thread with the offset within the adapter.
    """

    def __init__(self, offset_bytes: int, on_device: bool = True) -> None:
        self._offset_bytes = offset_bytes
        self.memory = bytearray(1 << 17)
        self.on_device = on_device
        self.before_digest: Callable[[int], object] = lambda at: None
        self.before_write: Callable[[int], object] = lambda at: None
        self.read: list[int] = []
        self.busy = self.most_reading = self._reading = 0
        self._pool = HostPool(memoryview(self.memory))
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.memory)

    def view(self, offset_bytes: int, length_bytes: int) -> memoryview | None:
        return None if self.on_device else self._pool.view(offset_bytes, length_bytes)

    def write(self, offset_bytes: int, data: Any) -> None:
        with self._busy(reading=0):
            self.before_write(offset_bytes - self._offset_bytes)
            self._pool.write(offset_bytes, data)

    def digest(self, digest: Any, offset_bytes: int, length_bytes: int) -> None:
        self.read.append(offset_bytes - self._offset_bytes)
        with self._busy(reading=1):
            self.before_digest(offset_bytes - self._offset_bytes)
            self._pool.digest(digest, offset_bytes, length_bytes)

    @contextmanager
    def _busy(self, reading: int) -> Iterator[None]:
        self._count(1, reading)
        try:
            yield
        finally:
            self._count(-1, -reading)

    def _count(self, busy: int, reading: int) -> None:
        with self._lock:
            self.busy, self._reading = self.busy + busy, self._reading + reading
            self.most_reading = max(self.most_reading, self._reading)
