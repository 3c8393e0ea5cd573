"""Tables of tuned block sizes: search, check, file, and use only on GPUs of their name."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from loraserve.kernels.lora import tuning
from loraserve.kernels.lora.tuning import (
    RANK_BUCKETS,
    TOKEN_BUCKETS,
    Blocks,
    TunedBlocks,
    TuningTable,
    default_blocks,
    pick,
)
from loraserve.model_shape import MODULES, ModelShape

pytest.importorskip("triton", reason="the GPU kernels need triton")

from loraserve.benchmarks.lora.cases import LLAMA_3_8B
from loraserve.benchmarks.lora.measure import WorldSettings
from loraserve.benchmarks.tuning import command, search
from loraserve.benchmarks.tuning import tuner as tuner_module
from loraserve.benchmarks.tuning.search import DECODE, PREFILL, SKIPPED, TuningTarget, cases_of, descend, targets
from loraserve.benchmarks.tuning.tuner import Tuner

GPU = "NVIDIA H100 80GB HBM3"
TINY = ModelShape(layers=1, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=50)
BLOCKS = Blocks(bm=16, br=16, bk=64, bn=64, be=16, split=2)
OUT = MODULES.index("o")


def on_cpu(shape: ModelShape) -> WorldSettings:
    return WorldSettings(device="cpu", shape=shape, layers=1, dtype=torch.float16)


class FakeTimer:
    """Runs a step once and returns the time that ``ms`` gives for the number of the call."""

    def __init__(self, ms: Callable[[int], float]) -> None:
        self.calls = 0
        self._ms = ms

    def ms(self, step: Callable[[], None]) -> float:
        step()
        self.calls += 1
        return self._ms(self.calls - 1)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    tuning._tuned.cache_clear()
    yield tmp_path
    tuning._tuned.cache_clear()


def entry(tokens: int = 64, rank: int = 256, ratio: float = 1.2) -> TunedBlocks:
    return TunedBlocks(k=4096, widths=(4096,), tokens=tokens, rank=rank, blocks=BLOCKS, floor_ratio=ratio)


def tiny_target(tokens: int = 8) -> TuningTarget:
    (found,) = [t for t in targets(TINY, [tokens], [16]) if t.module == OUT]
    return found


def test_a_table_round_trips_and_serves_its_gpu_alone(tables: Path, caplog: pytest.LogCaptureFixture) -> None:
    command.write_table(tables, GPU, "scripts/tune_kernels --tokens 64", "2026-11-25", [entry()])
    assert pick(GPU, 4096, (4096,), 40, 128) == BLOCKS
    assert pick(GPU, 4096, (4096,), 65, 128) == default_blocks(4096, 65)
    assert pick(GPU, 4096, (4096, 1024, 1024), 40, 128) == default_blocks(4096, 40)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert pick("NVIDIA H200", 4096, (4096,), 40, 128) == default_blocks(4096, 40)
    assert ["NVIDIA H200" in record.getMessage() for record in caplog.records] == [True], "said once"


def test_a_table_says_where_it_is_from_and_is_added_to(tables: Path) -> None:
    command.write_table(tables, GPU, "first", "2026-11-24", [entry(64), entry(8)])
    path = command.write_table(tables, GPU, "second", "2026-11-25", [entry(64, ratio=1.1), entry(64, 16)])
    assert path.name == "NVIDIA-H100-80GB-HBM3.json"
    table = msgspec.json.decode(path.read_bytes(), type=TuningTable)
    assert (table.gpu, table.command, table.date) == (GPU, "second", "2026-11-25")
    assert [(e.tokens, e.rank, e.floor_ratio) for e in table.entries] == [(8, 256, 1.2), (64, 16, 1.2), (64, 256, 1.1)]
    before = path.read_bytes()
    command.write_table(tables, GPU, "second", "2026-11-25", [entry(64, 16), entry(64, ratio=1.1)])
    assert path.read_bytes() == before, "whatever the order of measuring"


def test_every_module_and_bucket_is_a_target_and_mixed_decodes_are_first() -> None:
    found = targets(LLAMA_3_8B)
    assert len(found) == len(set(found)) == len(MODULES) * len(TOKEN_BUCKETS) * len(RANK_BUCKETS)
    assert {(t.tokens, t.rank) for t in found[: len(MODULES)]} == {(64, 256)}
    assert (found[0].k, found[0].widths) == (4096, (4096, 1024, 1024))
    assert [len(targets(LLAMA_3_8B, [8, 64], [16]))] == [2 * len(MODULES)]


def test_cases_fall_into_the_bucket_that_they_stand_for() -> None:
    for target in targets(TINY):
        many, few = cases_of(target)
        for case in (many, few):
            assert tuning.bucket(case.tokens, TOKEN_BUCKETS) == target.tokens
            assert tuning.bucket(max(case.used_ranks), RANK_BUCKETS) <= target.rank
        assert tuning.bucket(max(many.ranks), RANK_BUCKETS) == target.rank


def test_the_descent_finds_the_best_of_independent_fields_and_tries_nothing_twice() -> None:
    best = Blocks(bm=16, br=64, bk=512, bn=256, be=128, split=8, warps=8, stages=2, programs=6)
    seen: list[Blocks] = []

    def score(blocks: Blocks) -> float:
        seen.append(blocks)
        if blocks.warps == 8 and blocks.bn < 256:
            return SKIPPED
        return 1.0 + sum(getattr(blocks, field) != getattr(best, field) for field in DECODE)

    tried = descend([default_blocks(4096, 64)] * 2, DECODE, 4096, score, lambda: True)
    assert min(tried, key=lambda b: tried[b]) == best
    assert len(seen) == len(set(seen)) < 80
    assert all(b.split == 1 or b.split * b.bk <= 4096 for b in seen[1:]), "no part of K is empty"


@pytest.mark.parametrize(("tokens", "options"), [(64, DECODE), (4096, PREFILL)])
def test_no_candidate_would_copy_less_than_128_bits_at_a_time(tokens: int, options: search.Options) -> None:
    start = default_blocks(4096, tokens)
    tried = descend([start], options, 4096, lambda b: -float(b.be + b.warps), lambda: True)
    assert len({b.warps for b in tried}) > 1
    assert len({b.be for b in tried}) > 1
    for b in tried:
        assert min(b.bm * b.be, b.bm * b.bk, b.br * b.bk, b.be * b.bn) // (32 * b.warps) >= 8, b


def test_the_descent_ends_with_the_time() -> None:
    tried = descend([default_blocks(4096, 1024)], PREFILL, 4096, lambda blocks: 1.0, lambda: False)
    assert list(tried) == [default_blocks(4096, 1024)], "what is known to work is always measured"


@pytest.fixture(autouse=True)
def few_residents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few resident adapters, because the interpreter lists the work of each one by one."""
    monkeypatch.setattr(search, "RESIDENTS", 8)


def tune_tiny(ms: Callable[[int], float], target: TuningTarget | None = None) -> TunedBlocks | None:
    made = Tuner(FakeTimer(ms), 1e12, on_cpu(TINY))
    options = {"br": (16, 64), "bn": (64,)}
    return made.tune(target or tiny_target(), time.monotonic() + 60, options)


def test_the_fastest_right_sizes_of_a_target_are_kept() -> None:
    default = default_blocks(TINY.hidden, 8)
    # Two cases each: the default, br=16, br=64, bn=64.
    times = [4.0, 4.0, 2.0, 2.0, 8.0, 8.0, 3.0, 3.0]
    found = tune_tiny(lambda call: times[min(call, 7)])
    assert found is not None
    assert found.blocks == msgspec.structs.replace(default, br=16)
    assert (found.k, found.widths, found.tokens, found.rank) == (64, (64,), 8, 16)
    # Weights of ranks 8, 16, 8, ... 16 over 128 elements and 8 tokens of 3 * 64: geometric mean with one rank 8.
    floors = [2 * (96 * 128 + 8 * 192) / 1e9, 2 * (8 * 128 + 8 * 192) / 1e9]
    assert found.floor_ratio == pytest.approx(2.0 / (floors[0] * floors[1]) ** 0.5, rel=1e-3)


def test_sizes_that_do_not_compile_or_spill_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_resources(call: int) -> float:
        if call < 2:
            return 4.0
        raise RuntimeError("out of resource: shared memory")

    found = tune_tiny(out_of_resources)
    assert found is not None
    assert found.blocks == default_blocks(TINY.hidden, 8)
    monkeypatch.setattr(tuner_module, "spills", lambda: 4)
    assert tune_tiny(lambda call: 1.0) is None


def test_sizes_with_a_wrong_result_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner_module, "largest_error", lambda *operands: 0.5)
    assert tune_tiny(lambda call: 1.0) is None


def test_targets_share_the_time_and_each_entry_is_kept_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = targets(TINY, [8], [16])
    kept: list[TunedBlocks] = []
    deadlines_s: list[float] = []

    def measure(target: TuningTarget, deadline_s: float) -> TunedBlocks:
        deadlines_s.append(deadline_s - time.monotonic())
        return entry()

    assert command.tune_all(wanted, measure, 10.0, kept.append) == len(wanted) == len(kept)
    assert [round(left_s) for left_s in deadlines_s] == [150, 200, 300, 600]
    command.tune_all(wanted, measure, 1.0, kept.append)
    assert [round(left_s) for left_s in deadlines_s[4:]] == [45, 45, 45, 60]
    assert command.tune_all(wanted, lambda target, deadline_s: entry(), 0.0, kept.append) == 0
    assert f"{len(wanted)} of {len(wanted)} entries were not measured" in capsys.readouterr().err


def test_the_whole_run_with_a_fake_timer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    monkeypatch.setattr("loraserve.benchmarks.lora.measure.GraphTimer", lambda seconds: FakeTimer(lambda call: 1.0))
    monkeypatch.setattr("loraserve.benchmarks.lora.measure.copy_bytes_per_s", lambda timer: 1e9)
    monkeypatch.setattr(
        tuner_module, "Tuner", lambda timer, speed, settings: Tuner(timer, speed, on_cpu(settings.shape))
    )
    monkeypatch.setattr(command, "LLAMA_3_8B", TINY)
    arguments = ["--tokens", "8", "--ranks", "16", "--minutes", "0.0005", "--out", str(tmp_path)]
    clock = iter([0.0, 0.0, 1.0])
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert command.main(arguments) == 0
    table = msgspec.json.decode(command.table_path(tmp_path, GPU).read_bytes(), type=TuningTable)
    assert table.command == "scripts/tune_kernels " + " ".join(arguments)
    assert [(e.k, e.widths, e.tokens, e.rank) for e in table.entries] == [(64, (64, 32, 32), 8, 16)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what is said without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--minutes", "1"]) == 1
    assert "no CUDA GPU here" in capsys.readouterr().err
