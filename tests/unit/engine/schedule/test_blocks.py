"""KV blocks: counted by holder, shared where their content is known to be the same, reused in a sensible order."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraserve.engine.schedule.blocks import BlockManager, chain, root

DIGESTS = [root(f"content-{index}") for index in range(5)]


def manager(blocks: int = 4, prefix_cache: bool = True) -> BlockManager:
    return BlockManager(blocks, 2, prefix_cache)


def take(blocks: BlockManager, count: int) -> list[int]:
    taken = [blocks.take() for _ in range(count)]
    assert None not in taken
    return [block for block in taken if block is not None]


class BlockMachine(RuleBasedStateMachine):
    """Against counts by block, and the content that each block was given."""

    @initialize(blocks=st.integers(1, 6), prefix_cache=st.booleans())
    def begin(self, blocks: int, prefix_cache: bool) -> None:
        self.blocks = BlockManager(blocks, 2, prefix_cache)
        self.prefix_cache = prefix_cache
        self.holders: Counter[int] = Counter()
        self.content: dict[int, bytes] = {}

    @rule()
    def take(self) -> None:
        block = self.blocks.take()
        assert (block is None) == (len(+self.holders) == self.blocks.blocks)
        if block is not None:
            assert self.holders[block] == 0, "a block that is held was given out"
            self.holders[block] = 1
            self.content.pop(block, None)

    @rule(digest=st.sampled_from(DIGESTS))
    def share(self, digest: bytes) -> None:
        block = self.blocks.share(digest)
        assert (block is None) == (digest not in self.content.values())
        if block is not None:
            assert self.content[block] == digest, "a block of other content was shared"
            self.holders[block] += 1

    @precondition(lambda self: +self.holders)
    @rule(data=st.data(), digest=st.sampled_from(DIGESTS))
    def publish(self, data: st.DataObject, digest: bytes) -> None:
        block = data.draw(st.sampled_from(sorted(+self.holders)))
        self.blocks.publish(block, digest)
        if self.prefix_cache and block not in self.content and digest not in self.content.values():
            self.content[block] = digest

    @precondition(lambda self: +self.holders)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(+self.holders)))
        self.holders[block] -= 1
        self.blocks.give_back([block])

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "blocks"):
            self.blocks.validate()
            assert self.blocks.held == self.holders.total()
            assert self.blocks.free == self.blocks.blocks - len(+self.holders)


TestBlocks = BlockMachine.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_prefix_has_one_name_per_adapter_version() -> None:
    tokens = [1, 2]
    names = {chain(root(version), tokens) for version in ("", "v1", "v2")}
    assert len(names) == 3, "the base model and two versions must never share"
    assert chain(root("v1"), tokens) in names


def test_a_block_is_named_by_everything_before_it() -> None:
    first, other = chain(root("v"), [1, 2]), chain(root("v"), [2, 1])
    assert first != other
    assert chain(first, [3, 4]) != chain(other, [3, 4])
    # One long block is not two short ones, and a token is not two smaller ones side by side.
    assert chain(root("v"), [1, 2, 3, 4]) != chain(first, [3, 4])
    assert chain(root("v"), [1 << 16]) != chain(root("v"), [0, 1])


def test_nothing_is_shared_before_it_is_computed() -> None:
    blocks = manager()
    (block,) = take(blocks, 1)
    assert blocks.share(DIGESTS[0]) is None
    blocks.publish(block, DIGESTS[0])
    assert blocks.share(DIGESTS[0]) == block


def test_a_shared_block_is_free_when_its_last_holder_is_gone() -> None:
    blocks = manager(1)
    (block,) = take(blocks, 1)
    blocks.publish(block, DIGESTS[0])
    blocks.share(DIGESTS[0])
    blocks.give_back([block])
    assert (blocks.free, blocks.take()) == (0, None)
    blocks.give_back([block])
    assert blocks.free == 1


def test_content_stays_until_its_memory_is_wanted() -> None:
    blocks = manager(2)
    used = take(blocks, 1)
    blocks.publish(used[0], DIGESTS[0])
    blocks.give_back(used)
    assert take(blocks, 1) != used, "a block without content goes first"
    assert blocks.share(DIGESTS[0]) == used[0]
    blocks.give_back(used)
    assert take(blocks, 1) == used
    assert blocks.share(DIGESTS[0]) is None


def test_the_longest_unused_content_goes_first_and_of_one_sequence_its_end() -> None:
    blocks = manager(4)
    held = take(blocks, 4)
    for block, digest in zip(held, DIGESTS, strict=False):
        blocks.publish(block, digest)
    blocks.give_back(held[:2])
    blocks.give_back(held[2:])
    assert blocks.share(DIGESTS[1]) == held[1]
    blocks.give_back([held[1]])
    # The first two were given back earlier; the second of them was used again since.
    assert take(blocks, 4) == [held[0], held[3], held[2], held[1]]


def test_a_second_block_of_the_same_content_stays_private() -> None:
    blocks = manager(2)
    first, second = take(blocks, 2)
    blocks.publish(first, DIGESTS[0])
    blocks.publish(second, DIGESTS[0])
    assert blocks.share(DIGESTS[0]) == first
    blocks.give_back([first, first, second])
    blocks.validate()
    assert blocks.free == 2


def test_without_the_prefix_cache_nothing_is_shared() -> None:
    blocks = manager(prefix_cache=False)
    (block,) = take(blocks, 1)
    blocks.publish(block, DIGESTS[0])
    assert blocks.share(DIGESTS[0]) is None


def test_a_block_given_back_twice_is_noticed() -> None:
    blocks = manager()
    held = take(blocks, 1)
    blocks.give_back(held)
    blocks.give_back(held)
    with pytest.raises(AssertionError, match=f"block {held[0]} has -1 holders"):
        blocks.validate()


def test_what_is_forgotten_is_shared_with_nobody_and_free() -> None:
    manager = BlockManager(3, 4)
    held, idle = manager.take(), manager.take()
    assert held is not None
    assert idle is not None
    manager.publish(held, b"held")
    manager.publish(idle, b"idle")
    manager.give_back([idle])
    manager.forget()
    manager.validate()
    assert (manager.share(b"held"), manager.share(b"idle"), manager.free) == (None, None, 2)
    manager.give_back([held])
    manager.validate()
    assert manager.free == 3
