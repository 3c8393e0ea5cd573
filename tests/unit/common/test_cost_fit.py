"""Fits recover the model that generated the samples, and no coefficient is negative."""

from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.cost import CostModel, StepShape
from loraserve.cost.fit import LORA_TERMS, STEP_TERMS, LoadSample, Lora, StepSample, fit_cost_model, measure_residuals

TRUE = CostModel(
    step_base_s=0.021,
    sequence_s=0.002,
    kv_token_s=3e-7,
    prefill_token_s=0.0017,
    prefill_kv_token_s=4e-7,
    slab_byte_s=2e-10,
    rank_token_s=7e-6,
    padded_prefill_s=8e-6,
    padded_decode_s=3e-5,
    load_base_s=0.004,
    load_byte_s=6e-10,
)
RANKS = (8, 16, 32, 64)
BYTES_PER_RANK = 600_000
KINDS: tuple[Lora, ...] = ("exact", "padded")


def random_shape(rng: Random) -> StepShape:
    decodes, prefill = rng.choice([0, 1, 4, 16, 64]), rng.choice([0, 0, 64, 256, 512])
    ranks = [rng.choice(RANKS) for _ in range(rng.choice([0, 1, 4, 8]))]
    return StepShape(
        decode_sequences=decodes,
        kv_tokens=decodes * rng.randrange(64, 2048),
        prefill_tokens=prefill,
        prefill_kv_tokens=prefill * rng.randrange(64, 1024),
        slab_bytes=sum(ranks) * BYTES_PER_RANK,
        rank_tokens=sum(ranks) * (decodes + prefill) / max(len(ranks), 1),
        max_rank=max(ranks, default=0),
    )


def samples(cost: CostModel, count: int, noise: float = 0.0, seed: int = 1) -> list[StepSample]:
    rng = Random(seed)
    shapes = [random_shape(rng) for _ in range(count)]
    return [(shape, cost.step_s(shape) * rng.uniform(1 - noise, 1 + noise)) for shape in shapes]


def loads(cost: CostModel, noise: float = 0.0) -> list[LoadSample]:
    rng = Random(2)
    return [(size, cost.load_s(size) * rng.uniform(1 - noise, 1 + noise)) for size in (10**6, 10**7, 4 * 10**7, 10**8)]


@pytest.mark.parametrize("lora", KINDS)
@pytest.mark.parametrize(("noise", "within"), [(0.0, 1e-6), (0.05, 0.15)])
def test_a_fit_recovers_the_model_of_the_samples(lora: Lora, noise: float, within: float) -> None:
    true = msgspec.structs.replace(TRUE, lora=lora)
    cost, found = fit_cost_model(samples(true, 300, noise), loads(true, noise), lora)
    assert cost.lora == lora
    for name in ("step_base_s", *STEP_TERMS, *LORA_TERMS[lora], "load_base_s", "load_byte_s"):
        assert getattr(cost, name) == pytest.approx(getattr(true, name), rel=within), name
    assert found.samples == 300
    assert found.held_out == 60
    assert noise / 4 <= found.median <= noise + 1e-9
    assert found.median <= found.p90 <= 2 * noise + 1e-9


def test_small_steps_count_as_much_as_large_ones() -> None:
    """A step that takes 40 times as long must not dominate. Doubling its time changes a decode step's cost little."""
    steps = samples(TRUE, 100)
    odd = [(s, seconds * (2 if s.prefill_tokens == 512 else 1)) for s, seconds in steps]
    cost, _ = fit_cost_model(odd, loads(TRUE), "exact")
    decode = StepShape(decode_sequences=4, kv_tokens=1000)
    assert cost.step_s(decode) == pytest.approx(TRUE.step_s(decode), rel=0.35)


def test_terms_without_samples_keep_their_given_values() -> None:
    plain = [(StepShape(decode_sequences=n), TRUE.step_s(StepShape(decode_sequences=n))) for n in range(1, 20)]
    cost, _ = fit_cost_model(plain, loads(TRUE), "exact", unseen=CostModel())
    assert cost.sequence_s == pytest.approx(TRUE.sequence_s)
    for name in ("kv_token_s", "prefill_token_s", *LORA_TERMS["exact"], *LORA_TERMS["padded"]):
        assert getattr(cost, name) == getattr(CostModel(), name)
    cost, _ = fit_cost_model(plain, loads(TRUE), "exact")
    assert cost.slab_byte_s == cost.padded_decode_s == cost.prefill_token_s == 0


@settings(max_examples=40, deadline=None)
@given(seconds=st.lists(st.floats(1e-4, 10.0), min_size=40, max_size=40), lora=st.sampled_from(KINDS))
def test_coefficients_are_never_negative(seconds: list[float], lora: Lora) -> None:
    shapes = [shape for shape, _ in samples(TRUE, 40)]
    cost, found = fit_cost_model(list(zip(shapes, seconds, strict=True)), loads(TRUE), lora)
    assert min(v for v in msgspec.structs.astuple(cost) if not isinstance(v, str)) >= 0
    assert found.median >= 0


@pytest.mark.parametrize("count", [0, 1, 7])
def test_too_few_steps_are_refused_with_how_many_it_takes(count: int) -> None:
    with pytest.raises(ValueError, match=r"steps: \d+ samples are too few to fit \d terms with; measure at least \d"):
        fit_cost_model(samples(TRUE, count), loads(TRUE), "exact")


def test_too_few_loads_are_refused() -> None:
    with pytest.raises(ValueError, match="loads: 2 samples are too few to fit 2 terms with; measure at least 3"):
        fit_cost_model(samples(TRUE, 50), loads(TRUE)[:2], "exact")


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_samples_without_duration_are_refused(seconds: float) -> None:
    steps = samples(TRUE, 50)
    with pytest.raises(ValueError, match="steps: each sample must take a positive"):
        fit_cost_model([*steps, (steps[0][0], seconds)], loads(TRUE), "exact")


def test_residuals_come_from_held_out_steps() -> None:
    steps = samples(TRUE, 100)
    spoiled = [(s, seconds * (1.5 if i % 5 == 4 else 1)) for i, (s, seconds) in enumerate(steps)]
    cost, found = fit_cost_model(spoiled, loads(TRUE), "exact")
    assert cost.sequence_s == pytest.approx(TRUE.sequence_s)
    assert found.median == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="none is left"):
        measure_residuals(cost, [], 3)
