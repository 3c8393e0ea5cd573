"""Sampling compared with its definition in float64: each filter in turn, then the place in the sum."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loraserve.engine.compute.sampler import sample, uniform
from loraserve.engine.schedule.events import Sampled, SequenceStep
from loraserve.messages.sampling import SamplingParams

EOS = (1,)
Floats = NDArray[np.float64]


def logits_of(vocab: int, seed: int = 0, scale: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(vocab) * scale).astype(np.float32)


def row(
    history: tuple[int, ...] = (0,), prompt: int = 1, index: int = 0, name: str = "r", **params: Any
) -> SequenceStep:
    return SequenceStep(
        request_id=name,
        tokens=(0,),
        start=0,
        blocks=(0,),
        sampling=SamplingParams(max_tokens=100, **params),
        prompt_length=prompt,
        output_index=index,
        history=list(history),
    )


def draw(logits: NDArray[np.float32], step: SequenceStep) -> Sampled:
    (sampled,) = sample(logits[None].copy(), [step], EOS)
    return sampled


def penalized(logits: NDArray[np.float32], step: SequenceStep) -> Floats:
    """Apply penalties as vLLM does: repetition over prompt and output, frequency and presence over the output."""
    p, changed = step.sampling, logits.astype(np.float64)
    if step.output_index < p.min_tokens:
        changed[[*EOS, *p.stop_token_ids]] = -np.inf
    for token in set(step.history):
        changed[token] *= p.repetition_penalty if changed[token] <= 0 else 1 / p.repetition_penalty
    for token, count in Counter(step.history[step.prompt_length :]).items():
        changed[token] -= p.frequency_penalty * count + p.presence_penalty
    return changed


def softmax(values: Floats) -> Floats:
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def distribution(logits: NDArray[np.float32], step: SequenceStep) -> tuple[list[int], Floats]:
    """Return the tokens in the order of the sum, and their probabilities.

    Skips examples in which rounding decides where a filter cuts.
    """
    p = step.sampling
    probabilities = softmax(penalized(logits, step) / p.temperature)
    floor = p.min_p * probabilities.max()
    assume(not np.any(np.isclose(probabilities, floor, rtol=1e-4, atol=0)) or p.min_p == 0)
    tokens = [token for token in range(len(logits)) if probabilities[token] >= floor]
    if 0 < p.top_k < len(tokens) or p.top_p < 1 or p.min_p > 0:
        tokens.sort(key=lambda token: (-probabilities[token], token))
    if p.top_k > 0:
        tokens = tokens[: p.top_k]
    if p.top_p < 1:
        sums = np.cumsum(probabilities[tokens]) / probabilities[tokens].sum()
        assume(not np.any(np.isclose(sums, p.top_p, rtol=1e-4)))
        tokens = tokens[: int((sums < p.top_p).sum()) + 1]
    return tokens, probabilities[tokens] / probabilities[tokens].sum()


@settings(max_examples=300, deadline=None)
@given(
    vocab=st.sampled_from([4, 33, 256, 257, 1000]),
    seed=st.integers(0, 1 << 40),
    temperature=st.floats(0.1, 3.0),
    top_k=st.sampled_from([0, 1, 3, 40, 5000]),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    penalties=st.tuples(st.floats(0.5, 2.0), st.floats(-2.0, 2.0), st.floats(-2.0, 2.0)),
    history=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    index=st.integers(0, 3),
)
def test_the_token_is_that_of_the_definition(
    vocab: int,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalties: tuple[float, float, float],
    history: list[int],
    index: int,
) -> None:
    repetition, presence, frequency = penalties
    step = row(
        tuple(history),
        prompt=1,
        index=index,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        min_tokens=2,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    logits = logits_of(vocab, seed % 1000)
    tokens, probabilities = distribution(logits, step)
    token = draw(logits, step).token
    assert token in tokens, "the filters removed the sampled token"
    end = probabilities[: tokens.index(token) + 1].sum()
    begin = end - probabilities[tokens.index(token)]
    assert begin - 1e-4 <= uniform(seed, index) <= end + 1e-4


def test_frequencies_are_the_probabilities() -> None:
    logits = logits_of(12, scale=1.0)
    counts = Counter(draw(logits, row(seed=seed, temperature=0.8)).token for seed in range(6000))
    expected = softmax(logits / 0.8)
    for token in range(12):
        deviation = (6000 * expected[token] * (1 - expected[token])) ** 0.5
        assert abs(counts[token] - 6000 * expected[token]) < 5 * deviation


def test_greedy_takes_the_largest_logit_and_the_first_of_equals() -> None:
    logits = np.array([0.0, 2.0, 5.0, 5.0], dtype=np.float32)
    for temperature in (0.0, 1e-6):
        assert draw(logits, row(temperature=temperature)).token == 2


def test_a_low_temperature_is_nearly_greedy_and_a_high_one_nearly_even() -> None:
    logits = np.array([0.0, 1.0, 2.0], dtype=np.float32)
    assert {draw(logits, row(seed=s, temperature=0.02)).token for s in range(200)} == {2}
    hot = Counter(draw(logits, row(seed=s, temperature=1000.0)).token for s in range(900))
    assert all(250 < hot[token] < 350 for token in range(3))


@pytest.mark.parametrize(
    ("params", "left"),
    [
        ({"top_k": 2}, {3, 2}),
        ({"top_k": 1}, {3}),
        ({"top_k": 100}, {0, 1, 2, 3}),
        # Probabilities are 0.1, 0.2, 0.3 and 0.4. The token that reaches top_p is the last one kept.
        ({"top_p": 0.39}, {3}),
        ({"top_p": 0.41}, {3, 2}),
        ({"top_p": 0.71}, {3, 2, 1}),
        ({"min_p": 0.6}, {3, 2}),
        ({"min_p": 0.4}, {3, 2, 1}),
        # Of the two tokens that top_k keeps the first has 0.57.
        ({"top_k": 2, "top_p": 0.5}, {3}),
        ({"min_p": 0.6, "top_k": 3}, {3, 2}),
    ],
)
def test_filters_leave_the_expected_tokens(params: dict[str, Any], left: set[int]) -> None:
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32))
    assert {draw(logits, row(seed=seed, **params)).token for seed in range(400)} == left


def test_top_k_keeps_the_smaller_ids_of_equal_tokens() -> None:
    logits = np.zeros(600, dtype=np.float32)
    assert {draw(logits, row(seed=seed, top_k=3)).token for seed in range(200)} == {0, 1, 2}


def test_a_request_samples_the_same_in_any_batch() -> None:
    logits = np.stack([logits_of(300, seed) for seed in range(5)])
    steps = [
        row(name="greedy", temperature=0.0),
        row(name="seeded", seed=7, top_p=0.9),
        row(name="penalized", history=(3, 4, 4), seed=8, frequency_penalty=1.5),
        row(name="logprobs", seed=9, logprobs=3),
        row(name="early", seed=10, min_tokens=4),
    ]
    together = sample(logits.copy(), steps, EOS)
    alone = [draw(values, step) for values, step in zip(logits, steps, strict=True)]
    order = [3, 0, 4, 2, 1]
    shuffled = sample(logits[order].copy(), [steps[i] for i in order], EOS)
    assert together == alone
    assert [shuffled[order.index(i)] for i in range(5)] == alone
    assert [sampled.request_id for sampled in together] == ["greedy", "seeded", "penalized", "logprobs", "early"]


def test_draws_depend_on_seed_and_output_index() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    drawn = {
        (seed, index): draw(logits, row(seed=seed, index=index)).token for seed in range(20) for index in range(20)
    }
    assert drawn == {key: draw(logits, row(seed=key[0], index=key[1])).token for key in drawn}
    assert len(set(drawn.values())) > 250


def test_no_stop_token_is_sampled_before_min_tokens() -> None:
    logits = np.array([0.0, 9.0, 8.0, 1.0], dtype=np.float32)
    early = row(index=1, min_tokens=2, temperature=0.0, stop_token_ids=(2, 99))
    assert draw(logits, early).token == 3
    assert draw(logits, row(index=2, min_tokens=2, temperature=0.0, stop_token_ids=(2, 99))).token == 1


def test_presence_counts_once_and_frequency_each_occurrence_in_the_output() -> None:
    logits = np.array([0.0, 1.0, 3.0, 2.5], dtype=np.float32)
    history = (3, 2, 2)
    assert draw(logits, row(history, temperature=0.0, presence_penalty=0.4)).token == 2
    assert draw(logits, row(history, temperature=0.0, frequency_penalty=0.4)).token == 3
    assert draw(logits, row(history, prompt=3, temperature=0.0, frequency_penalty=2.0)).token == 2


def test_repetition_penalty_makes_seen_tokens_less_likely() -> None:
    assert draw(np.array([4.0, 3.0], dtype=np.float32), row((0,), temperature=0.0, repetition_penalty=2.0)).token == 1
    assert draw(np.array([-1.0, -1.5], dtype=np.float32), row((0,), temperature=0.0, repetition_penalty=2.0)).token == 1


@pytest.mark.parametrize("asked", [0, 1, 5, 700])
def test_logprobs_are_the_models_own(asked: int) -> None:
    """Log-probabilities are those before temperature, penalties and filters, as OpenAI's are."""
    logits = logits_of(600)
    logits[7] = logits[3] = logits.max() + 1
    step = row((3, 3), seed=4, temperature=0.5, top_k=50, frequency_penalty=1.0, logprobs=asked)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), dim=0)
    sampled = draw(logits, step)
    assert sampled.logprob == pytest.approx(float(expected[sampled.token]), abs=1e-5)
    best = torch.sort(expected, descending=True, stable=True).indices[:asked].tolist()
    assert [token for token, _ in sampled.top] == best
    assert best[:2] == [3, 7][: min(asked, 2)]
    for token, logprob in sampled.top:
        assert logprob == pytest.approx(float(expected[token]), abs=1e-5)


def test_no_logprobs_without_a_request_for_them() -> None:
    assert (draw(logits_of(10), row()).logprob, draw(logits_of(10), row()).top) == (0.0, ())


def test_impossible_tokens_are_never_drawn() -> None:
    logits = np.full(700, -np.inf, dtype=np.float32)
    logits[[5, 650]] = 1.0
    for params in ({}, {"top_p": 0.99}, {"top_k": 10}, {"min_p": 0.1}):
        assert {draw(logits, row(seed=seed, **params)).token for seed in range(60)} == {5, 650}


@given(seed=st.integers(-(1 << 63), (1 << 64) - 1), index=st.integers(0, 1 << 31))
def test_uniform_is_at_least_0_and_below_1(seed: int, index: int) -> None:
    assert 0.0 <= uniform(seed, index) < 1.0


def test_uniform_is_even_over_seeds_and_over_indices() -> None:
    for values in ([uniform(s, 0) for s in range(5000)], [uniform(1, i) for i in range(5000)]):
        counts, _ = np.histogram(values, bins=10, range=(0, 1))
        assert np.all(abs(counts - 500) < 5 * 500**0.5)
