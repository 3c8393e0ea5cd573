"""scripts/profile: the batches that it times, their shapes in the cost model, and a whole run on a tiny model."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.cost import StepShape
from loraserve.cost.profile import check_model, read_profile
from loraserve.engine.profile.command import main
from loraserve.engine.profile.measure import (
    KINDS,
    BatchPart,
    TimedBatch,
    design_batches,
    make_random_slab,
    make_step,
    place_slabs,
)
from loraserve.engine.schedule.events import SchedulerLimits
from loraserve.engine.schedule.report import step_shape
from loraserve.errors import ConfigError
from loraserve.messages import AdapterRef
from loraserve.testing.peft_writer import TINY_SHAPE
from loraserve.testing.slabs import unpack_slab
from loraserve.testing.tiny_model import write_peft_adapter, write_tiny_model

BLOCK = 16


def limits(kv_blocks: int, max_running: int, max_step_tokens: int, max_model_tokens: int) -> SchedulerLimits:
    return SchedulerLimits(
        kv_blocks=kv_blocks,
        block_tokens=BLOCK,
        pool_bytes=1 << 20,
        max_adapters=8,
        max_running=max_running,
        max_waiting=10,
        max_step_tokens=max_step_tokens,
        max_model_tokens=max_model_tokens,
        eos_token_ids=frozenset(),
    )


def sized_adapters(sizes: Iterable[tuple[int, int]]) -> dict[int, AdapterRef]:
    """Return adapters by slot from (rank, slab bytes)."""
    return {n: AdapterRef(name="", version="", rank=rank, slab_bytes=size) for n, (rank, size) in enumerate(sizes)}


def shape_of(batch: TimedBatch, adapters: Mapping[int, AdapterRef]) -> StepShape:
    decodes = [part for part in batch.parts if part.is_decode]
    prefills = [part for part in batch.parts if not part.is_decode]
    used = {part.adapter for part in batch.parts} - {-1}
    return StepShape(
        decode_sequences=len(decodes),
        kv_tokens=sum(part.context + 1 for part in decodes),
        prefill_tokens=sum(part.tokens for part in prefills),
        # Each token attends to the context, to the earlier new tokens of its sequence, and to itself.
        prefill_kv_tokens=sum(p.tokens * p.context + p.tokens * (p.tokens + 1) / 2 for p in prefills),
        slab_bytes=sum(adapters[index].slab_bytes for index in used),
        rank_tokens=sum(part.tokens * adapters[part.adapter].rank for part in batch.parts if part.adapter >= 0),
        max_rank=max((adapters[index].rank for index in used), default=0),
    )


@settings(max_examples=50, deadline=None)
@given(
    kv_blocks=st.integers(8, 4000),
    max_running=st.integers(1, 64),
    step_factor=st.integers(1, 8),
    max_model_tokens=st.integers(64, 4096),
    seed=st.integers(0, 100),
)
def test_no_batch_exceeds_the_engines_limits(
    kv_blocks: int, max_running: int, step_factor: int, max_model_tokens: int, seed: int
) -> None:
    allowed = limits(kv_blocks, max_running, max_running * step_factor, max_model_tokens)
    for batch in design_batches(allowed, adapters=5, count=24, seed=seed):
        assert batch.parts
        assert sum(part.tokens for part in batch.parts) <= allowed.max_step_tokens
        assert sum(part.is_decode for part in batch.parts) <= max_running
        assert all(part.context >= 0 and part.context + part.tokens <= max_model_tokens for part in batch.parts)
        assert all(-1 <= part.adapter < 5 for part in batch.parts)
        used = [block for sequence in make_step(0, batch, BLOCK, 100).sequences for block in sequence.blocks]
        assert len(used) == len(set(used))
        assert max(used) < kv_blocks


def test_a_profile_is_fitted_to_the_shapes_that_an_engine_reports() -> None:
    adapters = sized_adapters((8 << n, 1000 << n) for n in range(4))
    for index, batch in enumerate(design_batches(limits(4000, 64, 512, 4096), len(adapters), 60)):
        assert step_shape(make_step(index, batch, BLOCK, 100), adapters)[0] == shape_of(batch, adapters)


def test_every_kind_is_held_out_and_batches_match_their_kind() -> None:
    batches = design_batches(limits(2000, 64, 512, 2048), adapters=16, count=60)
    assert {batch.kind for batch in batches[4::5]} == set(KINDS)
    for batch in batches:
        assert any(part.adapter >= 0 for part in batch.parts) == ("adapters" in batch.kind)
        kinds = {part.is_decode for part in batch.parts}
        assert kinds == {"decode": {True}, "prefill": {False}, "both": {True, False}}[batch.kind.split(",")[0]]
    sizes = [len(batch.parts) for batch in batches if batch.kind == "decode"]
    assert min(sizes) == 1 < max(sizes)


def test_the_shape_of_a_batch() -> None:
    adapters = sized_adapters([(8, 800), (64, 6400), (16, 1600)])
    parts = (BatchPart(1, 99, 0), BatchPart(1, 49), BatchPart(4, 10, 2), BatchPart(3, 0, 0))
    step = make_step(0, TimedBatch("both, adapters", parts), BLOCK, 100)
    assert step_shape(step, adapters)[0] == StepShape(
        decode_sequences=2,
        kv_tokens=150,
        prefill_tokens=7,
        prefill_kv_tokens=(11 + 12 + 13 + 14) + (1 + 2 + 3),
        slab_bytes=800 + 1600,
        rank_tokens=8 + 4 * 16 + 3 * 8,
        max_rank=16,
    )


def test_make_random_slabs_are_adapters_and_are_placed_while_there_is_room() -> None:
    slabs = [make_random_slab(TINY_SHAPE, "bfloat16", rank, seed) for seed, rank in enumerate((4, 8, 4))]
    a, b, scale = unpack_slab(slabs[0].header, slabs[0].data)[0, "q_proj"]
    assert (a.shape, b.shape, scale) == ((4, 16), (16, 4), 0.25)
    assert a.any()
    assert len({slab.version for slab in slabs}) == 3
    placed = place_slabs(slabs, 1 << 20, slots=2)
    assert [slab for _, slab in placed] == slabs[:2]
    with pytest.raises(ConfigError, match=r"engine\.pool_bytes"):
        place_slabs(slabs, 0, slots=2)


@pytest.mark.parametrize("lora", ["exact", "padded"])
def test_a_tiny_model_is_measured_and_its_profile_is_usable(
    lora: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = write_tiny_model(tmp_path / "tiny", "llama")
    adapter = write_peft_adapter(tmp_path / "peft", shape, rank=8)
    out = tmp_path / "tiny.json"
    small = ["--set", "engine.kv_bytes=8000000", "--set", "engine.pool_bytes=8000000", "--set", "engine.device=cpu"]
    given = ["--adapter", str(adapter), "--ranks", "4,16"]
    # Steps of a millisecond are mostly noise, so that either status is possible.
    status = main(["--model", str(tmp_path / "tiny"), "--out", str(out), "--quick", "--lora", lora, *given, *small])
    said = capsys.readouterr()
    profile = read_profile(str(out))
    check_model(profile, shape)
    assert profile.residuals is not None
    assert profile.residuals.held_out == 12
    assert status == (0 if profile.residuals.median <= 0.1 else 1), said.err
    assert f"held-out error {profile.residuals.median:.1%} median" in said.out
    assert (profile.model, profile.origin, profile.device, profile.cost.lora) == ("tiny", "measured", "cpu", lora)
    assert profile.engine.pool_bytes == 8_000_000
    assert profile.engine.slab_bytes_per_rank > 0
    small_step, large_step = (StepShape(prefill_tokens=n, prefill_kv_tokens=n * n / 2) for n in (8, 256))
    assert 0 < profile.cost.step_s(small_step) < profile.cost.step_s(large_step)
    assert "timing 60 steps" in said.err


@pytest.mark.parametrize(
    ("model", "out", "reason"),
    [("missing", "p.json", "config.json"), ("missing", "nowhere/p.json", "there is no folder")],
)
def test_an_error_is_reported_in_one_line(
    model: str, out: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(tmp_path / model), "--out", str(tmp_path / out)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert reason in said.err
    assert not said.out
