"""The layers of a slab while its bytes come: which are whole, and whether each is the one that was packed."""

import hashlib
from collections.abc import Iterable

from loraserve.adapter.format import SlabHeader
from loraserve.engine.pool_memory import PoolMemory


class Arrivals:
    """Tells which layers become whole as the bytes of a slab come in order; each is told once."""

    def __init__(self, header: SlabHeader) -> None:
        self._header = header
        self._next = 0

    def upto(self, slab_bytes: int) -> range:
        """Layers that are whole now that the first ``slab_bytes`` are there and were not before."""
        first = self._next
        while self._next < self._header.shape.layers and self._header.layer(self._next).stop <= slab_bytes:
            self._next += 1
        return range(first, self._next)


def damaged_layer(pool: PoolMemory, header: SlabHeader, offset_bytes: int, layers: Iterable[int]) -> int | None:
    """The first of ``layers`` whose bytes, as the pool has them, are not those that the header has the digest of.

    The slab begins at ``offset_bytes`` of the pool. Reads the pool, so that no later mishap goes unseen.
    """
    for layer in layers:
        part = header.layer(layer)
        digest = hashlib.sha256()
        pool.digest(digest, offset_bytes + part.start, len(part))
        if digest.digest() != header.layer_digests[layer]:
            return layer
    return None
