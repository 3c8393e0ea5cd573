"""Compares the GPU kernels with the reference, on a GPU if there is one, else in Triton's interpreter."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from loraserve.kernels import lora
from loraserve.kernels.lora import reference
from loraserve.kernels.lora.tables import AdapterTables
from loraserve.model_shape import MODULES, SLICES, ModelShape

pytest.importorskip("triton", reason="the GPU kernels need triton")

from loraserve.kernels.lora import gpu, tuning
from loraserve.kernels.lora.work import LoraWork, Workspace

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
GARBAGE = 1 << 29
CASES = 210 if DEVICE == "cpu" else 30
"""On a GPU most cases compile two kernels for seconds, and gpu_accuracy covers them too."""
NAN = float("nan")
Mixed = Callable[[str, str], Any]


class Steps:
    """Adapters on the device, and steps with them. What a kernel must not read is NaN or far out of range."""

    def __init__(
        self, adapters: Any, capacity: int, max_rank: int = 256, blocks: tuple[tuning.Blocks, ...] | None = None
    ) -> None:
        self.adapters = adapters
        self.dtype = adapters.pool.dtype
        self.pool = adapters.pool.to(DEVICE)
        self.tables = AdapterTables(adapters.shape, len(adapters.headers), DEVICE)
        for slot, header in enumerate(adapters.headers):
            self.tables.install(slot, header, int(adapters.tables.base[slot]))
        self.space = Workspace(self.tables, capacity, max_rank, self.dtype, blocks)
        self.space.planes.fill_(NAN)
        self.space.hidden.fill_(NAN)

    def work(self, tokens: int, blocks: tuple[tuning.Blocks, ...] | None = None) -> LoraWork:
        work = LoraWork(self.tables, self.space, tokens, blocks)
        for buffer in (work.perm, work.lengths, work.tile_a, work.tile_place, work.group_b, work.group_place):
            buffer.fill_(GARBAGE)
        return work

    def plan(self, slots: list[int], blocks: tuple[tuning.Blocks, ...] | None = None) -> LoraWork:
        work = self.work(len(slots), blocks)
        work.plan(torch.tensor(slots, dtype=torch.int32, device=DEVICE))
        return work

    def operands(self, module: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        y, x = self.adapters.operands(module, tokens)
        return y.to(self.dtype), x.to(self.dtype)

    def added(self, work: LoraWork, layer: int, module: int) -> torch.Tensor:
        y, x = (operand.to(DEVICE) for operand in self.operands(module, work.tokens))
        gpu.add_lora(y, x, self.pool, self.tables, work, layer, module)
        for state in (self.space.tile_parts, self.space.group_tiles, self.space.ticket_counter):
            assert not state.any(), "a launch left its counters set"
        return y.cpu()

    def error(self, slots: list[int], layer: int, module: int, work: LoraWork | None = None) -> float:
        """Return the largest difference from the float32 reference, relative to the largest element."""
        y, x = (operand.float() for operand in self.operands(module, len(slots)))
        batch = lora.plan_batch(torch.tensor(slots, dtype=torch.int32))
        reference.add_lora(y, x, self.adapters.pool, self.adapters.tables, batch, layer, module)
        got = self.added(work or self.plan(slots), layer, module).float()
        assert not got.isnan().any(), "something was read that is no data"
        return float((got - y).abs().max() / y.abs().max())


def random_slots(tokens: int, slots: int, seed: int) -> list[int]:
    choose = random.Random(seed)
    return [choose.randrange(-1, slots) for _ in range(tokens)]


@pytest.mark.parametrize("shape", ["odd", "even"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 40, 300])
def test_equals_the_definition(mixed: Mixed, shape: str, dtype: str, tokens: int) -> None:
    steps = Steps(mixed(shape, dtype), tokens)
    slots = random_slots(tokens, 6, tokens)
    work = steps.plan(slots)
    for module in range(len(MODULES)):
        assert steps.error(slots, 1, module, work) < TOLERANCE[dtype]


def generated(seed: int, adapters_of: Any) -> tuple[Steps, list[int], int, int, set[int]]:
    """Return (steps, slots, layer, module, used ranks) of a generated case; the ranks cover all 256 in turn."""
    choose = random.Random(seed)
    head_dim = choose.choice([8, 16, 20, 32])
    shape = ModelShape(
        layers=1 + seed % 7 // 6, hidden=choose.choice([16, 24, 40, 64, 96]), heads=2, kv_heads=1,
        head_dim=head_dim, ffn=choose.choice([16, 30, 48, 80]), vocab=8,
    )  # fmt: skip
    layer, module = choose.randrange(shape.layers), choose.randrange(len(MODULES))
    slices = len(SLICES[MODULES[module]])
    fresh = iter(range(7 * seed, 10**9))
    ranks = []
    for _ in range(3):
        rows = [[choose.choice([0, 1, 8, 17]) for _ in SLICES[name]] for _ in range(shape.layers) for name in MODULES]
        rows[layer * len(MODULES) + module] = [1 + next(fresh) % 256 for _ in range(slices)]
        ranks.append([tuple(row) for row in rows])
    dtype = choose.choice(list(DTYPES))
    tokens = choose.choice([1, 2, 7, 16, 33, 64] * 2 + [257])
    slots = [0, 1, 2] + [choose.randrange(-1, 3) for _ in range(tokens)]
    used = {rank for rows in ranks for rank in rows[layer * len(MODULES) + module]}
    return Steps(adapters_of(shape, dtype, ranks, seed), len(slots)), slots, layer, module, used


def test_generated_cases_sample_every_rank(adapters_of: Any, measured: Callable[[str], None]) -> None:
    worst = dict.fromkeys(DTYPES, 0.0)
    seen: set[int] = set()
    for seed in range(CASES):
        steps, slots, layer, module, used = generated(seed, adapters_of)
        dtype = str(steps.dtype).removeprefix("torch.")
        error = steps.error(slots, layer, module)
        assert error < TOLERANCE[dtype], f"case {seed}: {error}"
        worst[dtype] = max(worst[dtype], error)
        seen |= used
    if CASES > 200:
        assert seen == set(range(1, 257))
    errors = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
    where = "on the GPU" if DEVICE == "cuda" else "in the interpreter"
    measured(f"GPU LoRA kernels {where}: {CASES} generated cases, {len(seen)} ranks, largest relative error {errors}")


@pytest.mark.parametrize("tokens", [12, 290])
def test_tokens_without_an_adapter_are_not_touched(mixed: Mixed, tokens: int) -> None:
    steps = Steps(mixed("odd", "bfloat16"), tokens)
    slots = [slot if t % 3 else -1 for t, slot in enumerate(random_slots(tokens, 6, 1))]
    work = steps.plan(slots)
    without = torch.tensor(slots) < 0
    for module in range(len(MODULES)):
        y, x = steps.operands(module, tokens)
        y[without], x[without] = NAN, NAN
        after = y.to(DEVICE)
        gpu.add_lora(after, x.to(DEVICE), steps.pool, steps.tables, work, 0, module)
        assert torch.equal(after.cpu().view(torch.int16)[without], y.view(torch.int16)[without])
        assert not after.cpu()[~without].isnan().any()


def test_steps_without_adapters_and_without_tokens(mixed: Mixed) -> None:
    steps = Steps(mixed("even", "float16"), 20)
    y, _ = steps.operands(2, 20)
    assert torch.equal(steps.added(steps.plan([-1] * 20), 0, 2), y)
    assert torch.equal(steps.added(steps.plan([5] * 20), 0, 2), y), "slot 5 has rank 0 everywhere"
    assert steps.added(steps.plan([]), 0, 2).shape == (0, y.shape[1])


@pytest.mark.parametrize("tokens", [24, 300])
def test_a_captured_list_serves_batches_of_more_and_fewer_groups(mixed: Mixed, tokens: int) -> None:
    steps = Steps(mixed("odd", "float16"), tokens)
    work = steps.work(tokens)
    places = [buffer.data_ptr() for buffer in (work.perm, work.lengths, work.tile_a, work.group_b)]
    for slots in ([2] * tokens, random_slots(tokens, 6, 3), [-1] * tokens, [0] * (tokens - 1) + [4], [4, 3] * tokens):
        work.plan(torch.tensor(slots[:tokens], dtype=torch.int32, device=DEVICE))
        for module in (0, 3):
            assert steps.error(slots[:tokens], 1, module, work) < TOLERANCE["float16"]
    assert places == [buffer.data_ptr() for buffer in (work.perm, work.lengths, work.tile_a, work.group_b)]


@pytest.mark.parametrize("tokens", [33, 300])
def test_the_same_batch_gives_the_same_bits(mixed: Mixed, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run twice, and with another number of programs, so that tiles finish in another order."""
    steps = Steps(mixed("even", "bfloat16"), tokens)
    work = steps.plan(random_slots(tokens, 6, 9))
    first = [steps.added(work, 0, module) for module in range(len(MODULES))]
    for programs in (gpu.multiprocessors(torch.device(DEVICE)), 1, 3):
        monkeypatch.setattr(gpu, "multiprocessors", lambda device, n=programs: n)
        for module, before in enumerate(first):
            assert torch.equal(steps.added(work, 0, module).view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize("split", [1, 2, 5])
def test_any_number_of_parts_of_k(mixed: Mixed, split: int) -> None:
    """K may have fewer blocks than parts. The last parts then have nothing to sum, but the kernel must count them."""
    blocks = (tuning.Blocks(bm=16, br=16, bk=32, bn=32, be=16, split=split),) * len(MODULES)
    steps = Steps(mixed("odd", "float32"), 256, blocks=blocks)
    slots = random_slots(20, 6, 2)
    work = steps.plan(slots, blocks)
    for module in range(len(MODULES)):
        assert steps.error(slots, 0, module, work) < TOLERANCE["float32"]


@pytest.mark.parametrize("tokens", [64, 300])
def test_modules_of_a_step_may_differ_in_their_blocks(mixed: Mixed, tokens: int) -> None:
    """Tuned tables give one module many groups and another many tiles, in a workspace of exactly their size."""
    steps = Steps(mixed("even", "float16"), tokens)
    sizes = {"bk": 32, "bn": 32, "be": 16}
    wide = tuning.Blocks(bm=16, br=128, split=1, **sizes)
    tall = tuning.Blocks(bm=64, br=16, split=2, **sizes)
    blocks = (wide, tall, tall, wide)
    steps.space = Workspace(steps.tables, tokens, 33, steps.dtype, blocks)
    slots = random_slots(tokens, 6, 4)
    work = steps.plan(slots, blocks)
    for module in range(len(MODULES)):
        assert steps.error(slots, 0, module, work) < TOLERANCE["float16"]


def test_ragged_prefill_beside_decodes(mixed: Mixed) -> None:
    """Prompts of very different lengths, full and partial groups, with single tokens between them."""
    steps = Steps(mixed("even", "bfloat16"), 400)
    slots = [0] * 130 + [1] + [2] * 64 + [-1] * 9 + [3] * 65 + [4] + [0, 1, 2, 3] * 7
    work = steps.plan(slots)
    for module in range(len(MODULES)):
        assert steps.error(slots, 1, module, work) < TOLERANCE["bfloat16"]


def test_large_adapters_are_started_first(mixed: Mixed) -> None:
    """The largest work must not start last, or all programs would wait for it."""
    steps = Steps(mixed("odd", "float32"), 64)
    work = steps.plan(list(range(6)))
    groups = int(work.lengths[0, 0])
    ranks = [header.rank for header in steps.adapters.headers]
    order = [int(work.perm[place]) for place in work.group_place[0, :groups, 0]]
    assert [ranks[slot] for slot in order] == sorted((ranks[slot] for slot in order), reverse=True)


def test_a_step_beyond_the_workspace_is_refused(mixed: Mixed) -> None:
    steps = Steps(mixed("odd", "float32"), 16)
    with pytest.raises(ValueError, match=r"17 tokens .* exceed a workspace for 16"):
        steps.work(17)


def test_operands_that_do_not_fit_are_refused(mixed: Mixed) -> None:
    steps = Steps(mixed("odd", "bfloat16"), 16)
    work = steps.plan([0, 1])
    y, x = (operand.to(DEVICE) for operand in steps.operands(0, 2))
    with pytest.raises(AssertionError):
        gpu.add_lora(y, x.float(), steps.pool, steps.tables, work, 0, 0)
    with pytest.raises(AssertionError):
        gpu.add_lora(y, x, steps.pool, steps.tables, work, 0, 1)
    with pytest.raises(AssertionError):
        gpu.add_lora(y, x[:1], steps.pool, steps.tables, work, 0, 0)
