"""KV blocks: who holds which, and which can be shared because their content is known. Pure.

A full block is named by the digest of (adapter version, all tokens up to its end), so that equal prefixes under the
same adapter share memory and nothing else ever does. A block becomes shareable once its KV was computed. Blocks that
nobody holds keep their name and content until their memory is wanted, least recently used first.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_BYTES = 16


def chain(previous: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of a full block, given that of the block before it (or of the adapter for the first)."""
    digest = blake2b(previous, digest_size=DIGEST_BYTES)
    digest.update(array("I", tokens).tobytes())
    return digest.digest()


def root(version: str) -> bytes:
    """Where the chain of an adapter's blocks begins; "" is the base model."""
    return blake2b(version.encode(), digest_size=DIGEST_BYTES).digest()


class BlockManager:
    """Reference counts of ``blocks`` blocks, and the cache of shareable ones."""

    def __init__(self, blocks: int, block_tokens: int, prefix_cache: bool = True) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self._prefix_cache = prefix_cache
        self._unused = list(range(blocks - 1, -1, -1))
        self._holders = [0] * blocks
        self._cached: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Blocks that could be given out now; idle cached ones count."""
        return len(self._unused) + len(self._idle)

    def take(self) -> int | None:
        """A block for new content, or None where all are held."""
        if self._unused:
            block = self._unused.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._cached[self._digest_of.pop(block)]
        else:
            return None
        self._holders[block] = 1
        return block

    def knows(self, digest: bytes) -> bool:
        """Whether a block of this content can be shared."""
        return digest in self._cached

    def share(self, digest: bytes) -> int | None:
        """One more holder of the block with this content, or None where nobody computed it."""
        block = self._cached.get(digest)
        if block is None:
            return None
        if self._holders[block] == 0:
            del self._idle[block]
        self._holders[block] += 1
        return block

    def publish(self, block: int, digest: bytes) -> None:
        """The block's KV is computed: others may share it. A second block of the same content stays private."""
        if self._prefix_cache and digest not in self._cached and block not in self._digest_of:
            self._cached[digest] = block
            self._digest_of[block] = digest

    def forget(self) -> None:
        """Nothing is shared any more of what was computed so far."""
        self._unused.extend(self._idle)
        self._idle.clear()
        self._cached.clear()
        self._digest_of.clear()

    def give_back(self, blocks: Sequence[int]) -> None:
        """One holder less for each; the last blocks of a sequence are the first to be reused."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._digest_of:
                    self._idle[block] = None
                else:
                    self._unused.append(block)

    def validate(self) -> None:
        """Every block is held, idle or unused, in one way only; the cache's two directions agree."""
        unused, idle = set(self._unused), set(self._idle)
        assert len(unused) == len(self._unused), "a block is unused twice"
        assert not unused & idle, "a block is unused and idle"
        for block, holders in enumerate(self._holders):
            assert holders >= 0, f"block {block} has {holders} holders"
            assert (holders == 0) == (block in unused or block in idle), f"block {block} is lost or given out twice"
        assert not unused & self._digest_of.keys(), "an unused block is cached"
        assert idle <= self._digest_of.keys(), "an idle block has no content"
        assert {d: b for b, d in self._digest_of.items()} == self._cached, "the cache disagrees with itself"

    @property
    def held(self) -> int:
        """Sum of holders over all blocks."""
        return sum(self._holders)
