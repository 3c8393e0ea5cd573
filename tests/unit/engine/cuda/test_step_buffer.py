"""The buffer of a step's integers on the device, with and without unused room, and the sizes of captured graphs."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraserve.engine.compute.protocol import PackedStep, pack_step
from loraserve.engine.schedule.events import SequenceStep
from loraserve.messages.sampling import SamplingParams

pytest.importorskip("triton", reason="the CUDA runner needs triton")

from loraserve.engine.cuda.decoder import NONE, BufferSize, StepBuffer
from loraserve.engine.cuda.graphs import batch_sizes, table_widths

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
VIEWS = (
    "tokens", "source", "positions", "slots", "kv_slots", "query_start", "seq_len", "table", "sampled",
)  # fmt: skip


def part(tokens: tuple[int, ...], start: int, blocks: tuple[int, ...], **fields: Any) -> SequenceStep:
    return SequenceStep(
        request_id="r", tokens=tokens, start=start, blocks=blocks, sampling=GREEDY, prompt_length=1, **fields
    )


def sent(buffer: StepBuffer, packed: PackedStep, source: list[int]) -> dict[str, Any]:
    buffer.send(packed, np.array(source, dtype=np.int32))
    return {name: getattr(buffer, name).tolist() for name in VIEWS}


@pytest.fixture
def two_decode() -> PackedStep:
    return pack_step([part((8,), 4, (5, 6), slot=2), part((9,), 2, (7,))], 4)


def test_a_buffer_of_exact_size_holds_the_step() -> None:
    packed = pack_step([part((11, 12, 13), 2, (5, 6), slot=1), part((9,), 0, (7,), sample=False)], 4)
    buffer = StepBuffer(BufferSize(tokens=4, sequences=2, blocks=2, sampled=1), DEVICE)
    assert sent(buffer, packed, [NONE, NONE, NONE, 3]) == {
        "tokens": [11, 12, 13, 9],
        "source": [NONE, NONE, NONE, 3],
        "positions": [2, 3, 4, 0],
        "slots": [1, 1, 1, -1],
        "kv_slots": [22, 23, 24, 28],
        "query_start": [0, 3, 4],
        "seq_len": [5, 1],
        "table": [[5, 6], [7, 0]],
        "sampled": [2],
    }


def test_unused_room_is_filled_with_tokens_that_access_no_memory(two_decode: PackedStep) -> None:
    buffer = StepBuffer(BufferSize(tokens=5, sequences=5, blocks=3, sampled=5), DEVICE)
    assert sent(buffer, two_decode, [0, NONE]) == {
        "tokens": [8, 9, 0, 0, 0],
        "source": [0, NONE, NONE, NONE, NONE],
        "positions": [4, 2, 0, 0, 0],
        "slots": [2, -1, -1, -1, -1],
        "kv_slots": [24, 30, -1, -1, -1],
        "query_start": [0, 1, 2, 3, 4, 5],
        "seq_len": [5, 3, 1, 1, 1],
        "table": [[5, 6, 0], [7, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
        "sampled": [0, 1, 2, 3, 4],
    }


def test_nothing_of_the_preceding_step_remains(two_decode: PackedStep) -> None:
    buffer = StepBuffer(BufferSize(tokens=4, sequences=4, blocks=3, sampled=4), DEVICE)
    full = pack_step([part((i,), 9, (i, i, i), slot=i) for i in range(1, 5)], 4)
    first = sent(buffer, two_decode, [0, 1])
    sent(buffer, full, [3, 2, 1, 0])
    assert sent(buffer, two_decode, [0, 1]) == first


def test_addresses_do_not_change(two_decode: PackedStep) -> None:
    buffer = StepBuffer(BufferSize(tokens=2, sequences=2, blocks=2, sampled=2), DEVICE)
    places = [getattr(buffer, name).data_ptr() for name in VIEWS]
    for _ in range(2):
        sent(buffer, two_decode, [NONE, NONE])
    assert [getattr(buffer, name).data_ptr() for name in VIEWS] == places
    for name in VIEWS:
        view = getattr(buffer, name)
        assert view.dtype == torch.int32, name
        assert view.is_contiguous(), name


def test_a_step_that_does_not_fit_is_refused(two_decode: PackedStep) -> None:
    for shape in (BufferSize(1, 2, 2, 2), BufferSize(2, 1, 2, 2), BufferSize(2, 2, 1, 2), BufferSize(2, 2, 2, 1)):
        with pytest.raises(ValueError, match="broadcast"):
            sent(StepBuffer(shape, DEVICE), two_decode, [NONE, NONE])


def test_graphs_are_captured_for_powers_of_two_and_max_running() -> None:
    assert batch_sizes(1) == (1,)
    assert batch_sizes(8) == (1, 2, 4, 8)
    assert batch_sizes(48) == (1, 2, 4, 8, 16, 32, 48)


@given(most=st.integers(1, 5000))
def test_each_step_has_a_graph_of_less_than_twice_its_size(most: int) -> None:
    sizes = batch_sizes(most)
    assert sizes == tuple(sorted(set(sizes)))
    assert sizes[-1] == most
    for less, more in pairwise(sizes):
        assert more <= 2 * less


def test_table_widths_depend_on_the_attention_backend() -> None:
    assert table_widths(2000, "paged") == (256, 2000), "unused width is copied, but not read"
    assert table_widths(100, "paged") == (100,)
    assert table_widths(2000, "gathered") == (16, 64, 256, 1024, 2000)
    assert table_widths(16, "gathered") == (16,)
    assert table_widths(5, "gathered") == (5,)
