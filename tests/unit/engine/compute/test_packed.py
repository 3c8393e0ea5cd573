"""A step's sequences are packed into arrays, compared with values computed by hand."""

from typing import Any

import numpy as np
import pytest

from loraserve.engine.compute.protocol import PackedStep, pack_step
from loraserve.engine.schedule.events import PENDING_TOKEN, SequenceStep
from loraserve.messages.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def part(tokens: tuple[int, ...], start: int = 0, blocks: tuple[int, ...] = (0,), **fields: Any) -> SequenceStep:
    return SequenceStep(
        request_id="r", tokens=tokens, start=start, blocks=blocks, sampling=GREEDY, prompt_length=1, **fields
    )


@pytest.fixture
def mixed() -> PackedStep:
    """Pack a whole prompt with an adapter, the middle of a long prompt, and a decoding sequence; blocks of 4 tokens."""
    return pack_step(
        [
            part((11, 12, 13, 14, 15), blocks=(7, 2), slot=3),
            part((21, 22, 23), start=6, blocks=(5, 9, 1), sample=False),
            part((PENDING_TOKEN,), start=8, blocks=(4, 6, 8), slot=0),
        ],
        block_tokens=4,
    )


def test_tokens_are_packed_sequence_after_sequence(mixed: PackedStep) -> None:
    assert mixed.tokens.tolist() == [11, 12, 13, 14, 15, 21, 22, 23, PENDING_TOKEN]
    assert mixed.slots.tolist() == [3, 3, 3, 3, 3, -1, -1, -1, 0]
    assert mixed.query_start.tolist() == [0, 5, 8, 9]
    assert mixed.queries.tolist() == [5, 3, 1]


def test_positions_continue_after_the_computed_tokens(mixed: PackedStep) -> None:
    assert mixed.positions.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 8]
    assert mixed.seq_len.tolist() == [5, 9, 9]


def test_each_token_has_a_kv_slot_in_its_own_block(mixed: PackedStep) -> None:
    assert mixed.table.tolist() == [[7, 2, 0], [5, 9, 1], [4, 6, 8]]
    assert mixed.kv_slots.tolist() == [28, 29, 30, 31, 8, 9 * 4 + 2, 9 * 4 + 3, 1 * 4, 8 * 4]


def test_the_sampled_rows_are_the_last_tokens_of_sampling_sequences(mixed: PackedStep) -> None:
    assert mixed.sampled.tolist() == [4, 8]


def test_no_row_is_sampled_if_no_sequence_samples() -> None:
    assert pack_step([part((1, 2), sample=False)], 4).sampled.tolist() == []


def test_the_block_table_is_as_wide_as_the_longest_sequence() -> None:
    held_ahead = part((1,), blocks=(3, 4, 5))
    assert pack_step([held_ahead, part((2,))], 4).table.tolist() == [[3, 4, 5], [0, 0, 0]]


def test_all_arrays_are_int32(mixed: PackedStep) -> None:
    for name in PackedStep.__dataclass_fields__:
        assert getattr(mixed, name).dtype == np.int32, name


def test_blocks_that_do_not_cover_the_tokens_are_refused() -> None:
    with pytest.raises(IndexError):
        pack_step([part((1, 2, 3, 4, 5))], 4)
