"""KV blocks are counted by reference, shared through the prefix cache, and evicted in order of release."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraserve.engine.schedule.blocks import BlockManager, chain_digest, root_digest

DIGESTS = [root_digest(f"content-{index}") for index in range(5)]


def manager(blocks: int = 4, prefix_cache: bool = True) -> BlockManager:
    return BlockManager(blocks, 2, prefix_cache)


def allocate(blocks: BlockManager, count: int) -> list[int]:
    allocated = blocks.allocate(count)
    assert allocated is not None
    return list(allocated)


class BlockMachine(RuleBasedStateMachine):
    """Compares the manager with reference counts by block and the content that each block was given."""

    @initialize(total=st.integers(1, 6), prefix_cache=st.booleans())
    def begin(self, total: int, prefix_cache: bool) -> None:
        self.blocks = BlockManager(total, 2, prefix_cache)
        self.total = total
        self.prefix_cache = prefix_cache
        self.references: Counter[int] = Counter()
        self.content: dict[int, bytes] = {}

    @rule(count=st.integers(1, 3))
    def allocate(self, count: int) -> None:
        allocated = self.blocks.allocate(count)
        assert (allocated is None) == (self.total - len(+self.references) < count)
        for block in allocated or ():
            assert self.references[block] == 0, "a referenced block was allocated"
            self.references[block] = 1
            self.content.pop(block, None)

    @rule(digest=st.sampled_from(DIGESTS))
    def acquire_cached(self, digest: bytes) -> None:
        block = self.blocks.acquire_cached(digest)
        assert (block is None) == (digest not in self.content.values())
        if block is not None:
            assert self.content[block] == digest, "a block with other content was shared"
            self.references[block] += 1

    @precondition(lambda self: +self.references)
    @rule(data=st.data(), digest=st.sampled_from(DIGESTS))
    def add_to_cache(self, data: st.DataObject, digest: bytes) -> None:
        block = data.draw(st.sampled_from(sorted(+self.references)))
        self.blocks.add_to_cache(block, digest)
        if self.prefix_cache and block not in self.content and digest not in self.content.values():
            self.content[block] = digest

    @precondition(lambda self: +self.references)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(+self.references)))
        self.references[block] -= 1
        self.blocks.release([block])

    @invariant()
    def is_consistent(self) -> None:
        if hasattr(self, "blocks"):
            self.blocks.validate()
            assert self.blocks.references == self.references.total()
            assert self.blocks.free == self.total - len(+self.references)


TestBlocks = BlockMachine.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_prefix_has_one_digest_per_adapter_version() -> None:
    tokens = [1, 2]
    names = {chain_digest(root_digest(version), tokens) for version in ("", "v1", "v2")}
    assert len(names) == 3, "the base model and two versions must not share blocks"
    assert chain_digest(root_digest("v1"), tokens) in names


def test_a_digest_depends_on_all_preceding_tokens() -> None:
    first, other = chain_digest(root_digest("v"), [1, 2]), chain_digest(root_digest("v"), [2, 1])
    assert first != other
    assert chain_digest(first, [3, 4]) != chain_digest(other, [3, 4])
    # A long block differs from two short ones, and a large token from two small ones.
    assert chain_digest(root_digest("v"), [1, 2, 3, 4]) != chain_digest(first, [3, 4])
    assert chain_digest(root_digest("v"), [1 << 16]) != chain_digest(root_digest("v"), [0, 1])


def test_a_block_is_not_shared_before_it_is_cached() -> None:
    blocks = manager()
    (block,) = allocate(blocks, 1)
    assert blocks.acquire_cached(DIGESTS[0]) is None
    blocks.add_to_cache(block, DIGESTS[0])
    assert blocks.acquire_cached(DIGESTS[0]) == block


def test_a_shared_block_is_free_after_its_last_release() -> None:
    blocks = manager(1)
    (block,) = allocate(blocks, 1)
    blocks.add_to_cache(block, DIGESTS[0])
    blocks.acquire_cached(DIGESTS[0])
    blocks.release([block])
    assert (blocks.free, blocks.allocate(1)) == (0, None)
    blocks.release([block])
    assert blocks.free == 1


def test_cached_content_stays_until_its_block_is_needed() -> None:
    blocks = manager(2)
    used = allocate(blocks, 1)
    blocks.add_to_cache(used[0], DIGESTS[0])
    blocks.release(used)
    assert allocate(blocks, 1) != used, "a block without content is allocated first"
    assert blocks.acquire_cached(DIGESTS[0]) == used[0]
    blocks.release(used)
    assert allocate(blocks, 1) == used
    assert blocks.acquire_cached(DIGESTS[0]) is None


def test_the_block_released_first_is_evicted_first_and_the_end_of_a_sequence_before_its_start() -> None:
    blocks = manager(4)
    held = allocate(blocks, 4)
    for block, digest in zip(held, DIGESTS, strict=False):
        blocks.add_to_cache(block, digest)
    blocks.release(held[:2])
    blocks.release(held[2:])
    assert blocks.acquire_cached(DIGESTS[1]) == held[1]
    blocks.release([held[1]])
    # The first two were released earlier; the second of them was used again since.
    assert allocate(blocks, 4) == [held[0], held[3], held[2], held[1]]


def test_a_second_block_with_the_same_content_stays_private() -> None:
    blocks = manager(2)
    first, second = allocate(blocks, 2)
    blocks.add_to_cache(first, DIGESTS[0])
    blocks.add_to_cache(second, DIGESTS[0])
    assert blocks.acquire_cached(DIGESTS[0]) == first
    blocks.release([first, first, second])
    blocks.validate()
    assert blocks.free == 2


def test_no_block_is_shared_without_the_prefix_cache() -> None:
    blocks = manager(prefix_cache=False)
    (block,) = allocate(blocks, 1)
    blocks.add_to_cache(block, DIGESTS[0])
    assert blocks.acquire_cached(DIGESTS[0]) is None


def test_validate_finds_a_block_that_was_released_twice() -> None:
    blocks = manager()
    held = allocate(blocks, 1)
    blocks.release(held)
    blocks.release(held)
    with pytest.raises(AssertionError, match=f"block {held[0]} has -1 references"):
        blocks.validate()


def test_clearing_the_cache_frees_unreferenced_blocks_and_shares_none() -> None:
    manager = BlockManager(3, 4)
    held, idle = allocate(manager, 2)
    manager.add_to_cache(held, b"held")
    manager.add_to_cache(idle, b"idle")
    manager.release([idle])
    manager.clear_cache()
    manager.validate()
    assert (manager.acquire_cached(b"held"), manager.acquire_cached(b"idle"), manager.free) == (None, None, 2)
    manager.release([held])
    manager.validate()
    assert manager.free == 3
