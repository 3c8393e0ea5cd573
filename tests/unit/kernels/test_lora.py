"""Compares the CPU kernel with its reference, the reference with float64, and the bits of different batches."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.kernels import lora
from loraserve.kernels.lora import cpu, reference
from loraserve.kernels.lora.tables import AdapterTables
from loraserve.model_shape import MODULES, SLICES, ModelShape

DTYPES = ["float32", "bfloat16", "float16"]
TINY = ModelShape(layers=1, hidden=24, heads=1, kv_heads=1, head_dim=20, ffn=40, vocab=8)
Mixed = Callable[[str, str], Any]


def random_slots(tokens: int, slots: int, seed: int) -> list[int]:
    choose = random.Random(seed)
    return [choose.randrange(-1, slots) for _ in range(tokens)]


def added(a: Any, slots: list[int], layer: int, module: int, function: Any = lora.add_lora) -> torch.Tensor:
    """Return the output of the call; each function gets the same operands."""
    y: torch.Tensor
    y, x = a.operands(module, len(slots))
    function(y, x, a.pool, a.tables, lora.plan_batch(torch.tensor(slots, dtype=torch.int32)), layer, module)
    return y


def assert_close(y: torch.Tensor, exact: torch.Tensor) -> None:
    assert y.shape == exact.shape
    if y.numel():
        assert (y - exact).abs().max() <= 1e-5 * exact.abs().max()


def in_float64(a: Any, slots: list[int], layer: int, module: int) -> torch.Tensor:
    """Return the result of the formula in adapter/format.py, token by token."""
    y: torch.Tensor
    y, x = a.operands(module, len(slots))
    y, x, pool = y.double(), x.double(), a.pool.double()
    name = MODULES[module]
    for t, slot in enumerate(slots):
        if slot < 0:
            continue
        row = a.headers[slot].row(layer, module)
        place = int(a.tables.base[slot]) + row.offset
        k = a.shape.in_features(name)
        stacked = pool[place : place + row.total_rank * k].view(row.total_rank, k)
        place += row.total_rank * k
        column = first = 0
        for rank, scale, width in zip(row.ranks, row.scales, a.shape.out_features(name), strict=True):
            b = pool[place : place + rank * width].view(rank, width)
            y[t, column : column + width] += scale * (x[t] @ stacked[first : first + rank].T) @ b
            place, first, column = place + rank * width, first + rank, column + width
    return y


@pytest.mark.parametrize("shape", ["odd", "even"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [cpu.add_lora, reference.add_lora])
def test_equals_the_formula_in_float64(mixed: Mixed, shape: str, dtype: str, function: Any) -> None:
    a = mixed(shape, dtype)
    for module in range(len(MODULES)):
        for tokens in (1, 2, 5, 40):
            slots = random_slots(tokens, 6, tokens)
            assert_close(added(a, slots, 1, module, function), in_float64(a, slots, 1, module))


ranks = st.sampled_from([0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 64, 127, 256])


@st.composite
def rank_rows(draw: Any) -> list[tuple[int, ...]]:
    return [tuple(draw(ranks) for _ in SLICES[name]) for name in MODULES]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(rank_rows(), min_size=1, max_size=3),
    slots=st.lists(st.integers(-1, 2), max_size=14),
    dtype=st.sampled_from(DTYPES),
    module=st.integers(0, 3),
)
def test_any_ranks_in_any_batch(
    adapters_of: Any, rows: list[list[tuple[int, ...]]], slots: list[int], dtype: str, module: int
) -> None:
    a = adapters_of(TINY, dtype, rows)
    slots = [min(slot, len(rows) - 1) for slot in slots]
    assert_close(added(a, slots, 0, module), added(a, slots, 0, module, reference.add_lora))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["odd", "even"])
def test_a_token_has_the_same_bits_alone_and_in_any_batch(mixed: Mixed, shape: str, dtype: str) -> None:
    a = mixed(shape, dtype)
    for module in range(len(MODULES)):
        slots = random_slots(24, 6, module)
        together = added(a, slots, 0, module)
        y, x = a.operands(module, len(slots))
        for t, slot in enumerate(slots):
            alone, batch = y[t : t + 1].clone(), lora.plan_batch(torch.tensor([slot], dtype=torch.int32))
            lora.add_lora(alone, x[t : t + 1].contiguous(), a.pool, a.tables, batch, 0, module)
            assert torch.equal(alone[0], together[t]), (module, t, slot)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_has_the_same_bits_whole_and_in_chunks(mixed: Mixed, dtype: str) -> None:
    a = mixed("even", dtype)
    for module in range(len(MODULES)):
        whole = added(a, [1] * 131, 0, module)
        y, x = a.operands(module, 131)
        for start, stop in ((0, 64), (64, 65), (65, 128), (128, 131)):
            batch = lora.plan_batch(torch.full((stop - start,), 1, dtype=torch.int32))
            lora.add_lora(y[start:stop], x[start:stop], a.pool, a.tables, batch, 0, module)
        assert torch.equal(y, whole)


def test_any_number_of_threads_gives_the_same_bits(
    mixed: Mixed, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    a = mixed("even", "bfloat16")
    monkeypatch.setattr(cpu, "SHARED_WORK", 0)
    for slots in (random_slots(24, 6, 1), [3], [2] * 100):
        for module in range(len(MODULES)):
            results = []
            for count in (1, 2, 3):
                threads(count)
                results.append(added(a, slots, 1, module))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])


def test_tokens_without_adapter_keep_their_bits(mixed: Mixed) -> None:
    a = mixed("odd", "bfloat16")
    slots = [-1, 0, -1, 5, 2, -1]  # slot 5 has no slices
    for module in range(len(MODULES)):
        y, _ = a.operands(module, len(slots))
        y[0, 0], y[2, 1] = float("nan"), -0.0
        before = y.clone().view(torch.int32)
        x = torch.full((len(slots), a.tables.in_features[module]), float("nan"))
        x[[1, 4]] = 1.0
        batch = lora.plan_batch(torch.tensor(slots, dtype=torch.int32))
        lora.add_lora(y, x, a.pool, a.tables, batch, 0, module)
        assert torch.equal(y.view(torch.int32)[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
        assert y[[1, 4]].isfinite().all()


def test_steps_without_adapters_or_without_tokens(mixed: Mixed) -> None:
    a = mixed("odd", "float32")
    assert lora.plan_batch(torch.tensor([-1, -1], dtype=torch.int32)).empty
    assert lora.plan_batch(torch.empty(0, dtype=torch.int32)).empty
    for slots in ([], [-1, -1]):
        assert torch.equal(added(a, slots, 0, 0), a.operands(0, len(slots))[0])


def test_a_removed_adapter_adds_nothing(mixed: Mixed) -> None:
    a = mixed("even", "float16")
    header, base = a.headers[2], int(a.tables.base[2])
    a.tables.remove(2)
    try:
        a.tables.validate()
        assert torch.equal(added(a, [2, 2], 0, 2), a.operands(2, 2)[0])
    finally:
        a.tables.install(2, header, base)


def test_plan_groups_tokens_by_slot() -> None:
    batch = lora.plan_batch(torch.tensor([4, -1, 2, 4, -1, 2, 0], dtype=torch.int32))
    assert batch.perm.tolist() == [6, 2, 5, 0, 3]
    assert batch.group_slot.tolist() == [0, 2, 4]
    assert batch.group_start.tolist() == [0, 1, 3, 5]
    assert (batch.tokens, batch.groups, batch.empty) == (7, 3, False)


def test_work_counts_true_ranks(adapters_of: Any) -> None:
    rows = [[(2, 0, 1), (0,), (0, 0), (3,)], [(0, 0, 0), (5,), (0, 0), (0,)]]
    a = adapters_of(TINY, "float32", rows)
    batch = lora.plan_batch(torch.tensor([0, 1, 1, 1, 1, 1, 1], dtype=torch.int32))
    qkv, down = 3 * 24 + 2 * 20 + 20, 3 * (40 + 24)
    assert batch.work(a.tables) == [4 * qkv, 6 * 5 * (20 + 24), 0, 4 * down]


def test_operands_of_another_shape_are_refused(mixed: Mixed) -> None:
    a = mixed("odd", "float32")
    y, x = a.operands(0, 2)
    batch = lora.plan_batch(torch.tensor([0, 1], dtype=torch.int32))
    wide = torch.zeros(2, 2 * x.shape[1])[:, ::2]
    for bad_y, bad_x in ((y, x[:1]), (y[:, :-1], x), (y, x.double()), (y, wide)):
        with pytest.raises(AssertionError):
            lora.add_lora(bad_y, bad_x, a.pool, a.tables, batch, 0, 0)
    with pytest.raises(AssertionError):
        lora.add_lora(y, x, a.pool[::2], a.tables, batch, 0, 0)


def test_tables_refuse_a_slab_of_another_model(mixed: Mixed) -> None:
    a = mixed("odd", "float32")
    with pytest.raises(ValueError, match="register the adapter again"):
        AdapterTables(TINY, 1).install(0, a.headers[0], 0)


def test_tables_notice_a_damaged_layout(mixed: Mixed) -> None:
    a = mixed("odd", "float32")
    tables = AdapterTables(a.shape, 1)
    tables.install(0, a.headers[0], 7)
    tables.validate()
    tables.layout[0, 1, 2, 1] += 1
    with pytest.raises(AssertionError, match="do not sum"):
        tables.validate()
