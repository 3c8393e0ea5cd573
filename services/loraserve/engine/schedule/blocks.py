"""Allocates KV blocks, counts their references, and caches shared prefixes.

The cache key of a full block is a digest of the adapter version and all tokens up to the end of the block. Only
requests with the same adapter and the same prefix share blocks. A block enters the cache once its KV is computed. A
cached block without references keeps its content until its memory is needed. The block released first is evicted first.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_BYTES = 16


def chain_digest(previous: bytes, tokens: Sequence[int]) -> bytes:
    """Return the digest of a full block. ``previous`` is the digest of the block before it, or the root digest."""
    digest = blake2b(previous, digest_size=DIGEST_BYTES)
    digest.update(array("I", tokens).tobytes())
    return digest.digest()


def root_digest(version: str) -> bytes:
    """Return the digest that starts the chain of an adapter's blocks. The version "" is the base model."""
    return blake2b(version.encode(), digest_size=DIGEST_BYTES).digest()


class BlockManager:
    """Allocates ``total`` KV blocks of ``block_tokens`` tokens each, and finds cached blocks by digest."""

    def __init__(self, total: int, block_tokens: int, prefix_cache: bool = True) -> None:
        self.block_tokens = block_tokens
        self._prefix_cache = prefix_cache
        self._unused = list(range(total - 1, -1, -1))
        self._references = [0] * total
        self._cached: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        # Cached blocks without references, in the order in which they were released.
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Number of blocks that can be allocated now, including cached blocks that can be evicted."""
        return len(self._unused) + len(self._evictable)

    @property
    def references(self) -> int:
        return sum(self._references)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """Return ``count`` blocks, evicting cached blocks if needed. Returns None if fewer blocks are free."""
        if count > self.free:
            return None
        return tuple(self._allocate_one() for _ in range(count))

    def has_cached(self, digest: bytes) -> bool:
        return digest in self._cached

    def acquire_cached(self, digest: bytes) -> int | None:
        """Add a reference to the cached block with this digest and return it. Returns None if none is cached."""
        block = self._cached.get(digest)
        if block is None:
            return None
        if self._references[block] == 0:
            del self._evictable[block]
        self._references[block] += 1
        return block

    def add_to_cache(self, block: int, digest: bytes) -> None:
        """Let later requests share a computed block. Does nothing if caching is off or block or digest is cached."""
        if self._prefix_cache and digest not in self._cached and block not in self._digest_of:
            self._cached[digest] = block
            self._digest_of[block] = digest

    def clear_cache(self) -> None:
        """Remove all blocks from the cache. Running sequences keep their blocks."""
        self._unused.extend(self._evictable)
        self._evictable.clear()
        self._cached.clear()
        self._digest_of.clear()

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block, starting with the last, so that a prefix is evicted from its end."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._digest_of:
                    self._evictable[block] = None
                else:
                    self._unused.append(block)

    def validate(self) -> None:
        """Raise AssertionError if a block is lost, is listed twice or disagrees with the cache's indexes."""
        unused, evictable = set(self._unused), set(self._evictable)
        assert len(unused) == len(self._unused), "a block is listed as unused twice"
        assert not unused & evictable, "a block is unused and evictable"
        for block, count in enumerate(self._references):
            assert count >= 0, f"block {block} has {count} references"
            is_free = block in unused or block in evictable
            assert (count == 0) == is_free, f"block {block} is lost or allocated twice"
        assert not unused & self._digest_of.keys(), "an unused block is cached"
        assert evictable <= self._digest_of.keys(), "an evictable block has no content"
        assert {d: b for b, d in self._digest_of.items()} == self._cached, "the cache's two indexes disagree"

    def _allocate_one(self) -> int:
        if self._unused:
            block = self._unused.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            del self._cached[self._digest_of.pop(block)]
        self._references[block] = 1
        return block
