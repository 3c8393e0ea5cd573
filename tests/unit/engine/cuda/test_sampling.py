"""Drawing tokens on the device, against the CPU's sampler as the definition, which draws row by row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loraserve.engine.compute import sampler
from loraserve.engine.cuda.sampling import MAX_VOCAB, NARROW, Drawn, draw, largest_first, prepare, sampled
from loraserve.engine.schedule.events import Sampled, SequenceStep
from loraserve.messages.sampling import SamplingParams
from loraserve.messages.stop import forbidden_tokens

EOS = (1,)
ROUNDING = 1e-6
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
    ),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
Logits = NDArray[np.float32]


def row(history: Sequence[int] = (0,), prompt: int = 1, index: int = 0, name: str = "r", **params: Any) -> SequenceStep:
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


def logits_of(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> Logits:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * scale).astype(np.float32)


def drawn_on(device: str, logits: Logits | torch.Tensor, steps: Sequence[SequenceStep]) -> list[Sampled]:
    values = torch.as_tensor(logits).to(device)
    before = values.clone()
    drawn = draw(values, prepare(steps, values.shape[1], EOS, torch.device(device)))
    assert torch.equal(values.nan_to_num(), before.nan_to_num()), "the caller's logits are left as they are"
    return downloaded(steps, drawn)


def downloaded(steps: Sequence[SequenceStep], drawn: Drawn) -> list[Sampled]:
    return sampled(steps, *(part if part is None else part.cpu().numpy() for part in drawn))


def defined(logits: Logits, steps: Sequence[SequenceStep]) -> list[Sampled]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sampler.sample(logits.copy(), steps, EOS)


def assert_tokens_as_defined(logits: Logits, steps: Sequence[SequenceStep], got: list[Sampled]) -> int:
    """The number of rows that rounding decided otherwise."""
    different = 0
    for values, step, ours, expected in zip(logits, steps, got, defined(logits, steps), strict=True):
        if ours.token != expected.token:
            assert rounding_decides(values, step, ours.token, expected.token), (step.sampling, ours, expected)
            different += 1
    return different


def rounding_decides(logits: Logits, step: SequenceStep, ours: int, expected: int) -> bool:
    """Whether ``u`` is next to the boundary between the two tokens, or some filter cuts next to a token's share."""
    p, values = step.sampling, logits.copy()
    values[forbidden_tokens(p, step.output_index, EOS, len(values))] = -np.inf
    sampler._penalize(values, step)
    weights = np.exp((values - values.max()) / np.float32(p.temperature))
    if cuts_within_rounding(weights, p):
        return True
    tokens = sampler._candidates(weights, p)
    order = list(range(len(weights))) if tokens is None else tokens.tolist()
    ends = np.cumsum(weights[order], dtype=np.float64)
    first, last = sorted((order.index(ours), order.index(expected)))
    boundaries = ends[[first, last - 1]] / ends[-1]
    return bool(np.all(abs(boundaries - sampler.uniform(p.seed, step.output_index)) < ROUNDING))


def cuts_within_rounding(weights: Logits, p: SamplingParams) -> bool:
    if p.min_p > 0 and np.any(np.isclose(weights, p.min_p, rtol=ROUNDING, atol=0)):
        return True
    ordered = np.sort(weights)[::-1].astype(np.float64)
    ordered = ordered[ordered >= p.min_p]
    if 0 < p.top_k < len(ordered):
        if 0 < ordered[p.top_k - 1] - ordered[p.top_k] < ROUNDING * ordered[p.top_k]:
            return True
        ordered = ordered[: p.top_k]
    sums = np.cumsum(ordered) / ordered.sum()
    return p.top_p < 1 and bool(np.any(abs(sums - p.top_p) < ROUNDING))


@st.composite
def steps_of(draw_from: st.DrawFn) -> SequenceStep:
    """Any row: some parameter is at its default in half of them, so that all kinds of rows share batches."""

    def maybe(default: Any, other: st.SearchStrategy[Any]) -> Any:
        return draw_from(st.one_of(st.just(default), other))

    history = draw_from(st.lists(st.integers(0, 6), min_size=1, max_size=12))
    return row(
        history,
        prompt=draw_from(st.integers(1, len(history))),
        index=draw_from(st.integers(0, 3)),
        seed=draw_from(st.integers(-(1 << 40), 1 << 40)),
        temperature=maybe(0.0, st.floats(0.1, 3.0)),
        top_k=maybe(0, st.sampled_from([-1, 1, 2, 5, 40, 256, 5000])),
        top_p=maybe(1.0, st.floats(0.0, 0.999)),
        min_p=maybe(0.0, st.floats(0.001, 1.0)),
        repetition_penalty=maybe(1.0, st.floats(0.5, 2.0)),
        presence_penalty=maybe(0.0, st.floats(-2.0, 2.0)),
        frequency_penalty=maybe(0.0, st.floats(-2.0, 2.0)),
        min_tokens=maybe(0, st.just(2)),
        stop_token_ids=maybe((), st.just((3, 99999))),
        logprobs=maybe(None, st.sampled_from([0, 1, 4, 300])),
    )


@on_each_device
@settings(max_examples=300, deadline=None)
@given(
    steps=st.lists(steps_of(), max_size=8),
    vocab=st.sampled_from([7, 257, 1000]),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    ties=st.booleans(),
)
def test_every_row_is_as_the_cpu_draws_it(
    device: str, steps: list[SequenceStep], vocab: int, seed: int, scale: float, ties: bool
) -> None:
    logits = logits_of(len(steps), vocab, seed, scale)
    if ties:
        logits = np.round(logits)
    got = drawn_on(device, logits, steps)
    assert_tokens_as_defined(logits, steps, got)
    for values, step, ours, expected in zip(logits, steps, got, defined(logits, steps), strict=True):
        assert ours.request_id == expected.request_id
        assert_logprobs_as_defined(values, step, ours, expected)


def assert_logprobs_as_defined(logits: Logits, step: SequenceStep, ours: Sampled, expected: Sampled) -> None:
    assert [token for token, _ in ours.top] == [token for token, _ in expected.top]
    assert [p for _, p in ours.top] == pytest.approx([p for _, p in expected.top], abs=1e-5)
    asked = step.sampling.logprobs is not None
    own = float(logits[ours.token]) - sampler._log_sum_exp(logits) if asked else 0.0
    assert ours.logprob == pytest.approx(own, abs=1e-5)


FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 40},
    {"top_k": NARROW + 1},
    {"top_p": 0.9, "temperature": 1.3},
    {"min_p": 0.02},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.01},
    {"frequency_penalty": 0.3, "presence_penalty": 0.5, "repetition_penalty": 1.3},
)


@on_each_device
def test_hardly_a_draw_depends_on_rounding(device: str) -> None:
    different, draws = 0, 60 * len(FILTERS)
    for seed in range(60):
        steps, logits = [row(seed=seed, **params) for params in FILTERS], logits_of(len(FILTERS), 3000, seed)
        different += assert_tokens_as_defined(logits, steps, drawn_on(device, logits, steps))
    assert different <= 0.01 * draws


@on_each_device
@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_k": 2000}, {"top_p": 0.25}, {"min_p": 1.0}])
def test_of_equal_tokens_it_draws_the_cpus(device: str, params: dict[str, Any]) -> None:
    steps = [row(seed=seed, **params) for seed in range(200)]
    for vocab in (600, 2048, 2500):
        logits = np.full((200, vocab), -1.5, dtype=np.float32)
        got = [s.token for s in drawn_on(device, logits, steps)]
        assert got == [s.token for s in defined(logits, steps)]
        assert max(got) < params.get("top_k", vocab) * params.get("top_p", 1.0)


@on_each_device
@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0}])
@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_rows_that_are_not_finite_take_what_the_cpu_takes(device: str, params: dict[str, Any], special: float) -> None:
    logits = logits_of(4, 700)
    logits[1] = -np.inf
    logits[2, [50, 300]] = special
    logits[3, 3:] = special
    steps = [row(seed=seed, logprobs=0, **params) for seed in range(4)]
    got, expected = drawn_on(device, logits, steps), defined(logits, steps)
    assert [s.token for s in got] == [s.token for s in expected]
    assert [s.token for s in got][1:] == [0, 50, 3]
    assert np.isnan([s.logprob for s in got]).tolist() == [False, True, True, True]


@on_each_device
def test_impossible_tokens_are_never_drawn(device: str) -> None:
    logits = np.full((60, 700), -np.inf, dtype=np.float32)
    logits[:, [5, 650]] = 1.0
    for params in ({}, {"top_p": 0.99}, {"top_k": 10}, {"min_p": 0.1}):
        steps = [row(seed=seed, **params) for seed in range(60)]
        assert {s.token for s in drawn_on(device, logits, steps)} == {5, 650}


@pytest.mark.parametrize(
    ("u", "tokens"), [(0.0, [1, 1, 1]), (0.25, [3, 3, 3]), (0.75, [6, 6, 6]), (1 - 2.0**-53, [6, 6, 6])]
)
def test_a_token_begins_where_the_one_before_ends(u: float, tokens: list[int]) -> None:
    logits = torch.zeros(3, 7)
    logits[:, [0, 2, 5]] = -torch.inf
    steps = [row(), row(top_k=6), row(top_p=0.9999)]
    inputs = prepare(steps, 7, EOS, torch.device("cpu"))
    for draws in (inputs.plain, inputs.narrow, inputs.wide):
        draws.u.fill_(u)
    assert draw(logits, inputs).tokens.tolist() == tokens


@pytest.mark.parametrize("vocab", [1, 7, 256, 3000, 40_001, MAX_VOCAB])
def test_u_never_points_beyond_the_last_token(vocab: int) -> None:
    """Sums of more than 2^53 shares are rounded where ``u`` multiplies them, up for some of these."""
    inputs = prepare([row(), row(top_p=0.999999)], vocab, EOS, torch.device("cpu"))
    for draws in (inputs.plain, inputs.wide):
        draws.u.fill_(1 - 2.0**-53)
    logits = torch.full((2, vocab), -torch.inf)
    logits[:, : (vocab + 1) // 2] = torch.rand((vocab + 1) // 2, generator=torch.Generator().manual_seed(0)) / 100
    plain, wide = draw(logits, inputs).tokens.tolist()
    assert plain == (vocab + 1) // 2 - 1
    assert wide < (vocab + 1) // 2


@on_each_device
def test_greedy_sees_penalties_and_what_is_forbidden(device: str) -> None:
    logits = np.array([[0.0, 9.0, 8.0, 1.0], [0.0, 1.0, 3.0, 2.5], [0.0, -1.0, 4.0, 3.0]], dtype=np.float32)
    steps = [
        row(index=1, min_tokens=2, stop_token_ids=(2, 99, -1), temperature=0.0),
        row((3, 2, 2), frequency_penalty=0.4, temperature=0.0),
        row((2,), repetition_penalty=2.0, temperature=0.0),
    ]
    assert [s.token for s in drawn_on(device, logits, steps)] == [3, 3, 3]
    later = [row(index=2, min_tokens=2, temperature=0.0), row((3, 2, 2), prompt=3, frequency_penalty=2.0)]
    later[1] = row((3, 2, 2), prompt=3, frequency_penalty=2.0, temperature=0.0)
    assert [s.token for s in drawn_on(device, logits[:2], later)] == [1, 2]


@on_each_device
@pytest.mark.parametrize("asked", [0, 1, 5, 700, NARROW + 7])
def test_logprobs_are_the_models_own(device: str, asked: int) -> None:
    logits = logits_of(1, 1500)
    logits[0, 7] = logits[0, 3] = logits.max() + 1
    step = row((3, 3), seed=4, temperature=0.5, top_k=50, frequency_penalty=1.0, logprobs=asked)
    (got,) = drawn_on(device, logits, [step])
    exact = torch.log_softmax(torch.from_numpy(logits[0]).double(), dim=0)
    best = torch.sort(exact, descending=True, stable=True).indices[:asked].tolist()
    assert [token for token, _ in got.top] == best
    for token, logprob in ((got.token, got.logprob), *got.top):
        assert logprob == pytest.approx(float(exact[token]), abs=1e-5)


def test_each_row_gets_as_many_of_the_best_as_it_asked_for() -> None:
    steps = [row(logprobs=asked) for asked in (None, 0, 2, 9)]
    logits = logits_of(4, 7)
    got = drawn_on("cpu", logits, steps)
    assert [len(s.top) for s in got] == [len(s.top) for s in defined(logits, steps)] == [0, 0, 2, 7]
    assert (got[0].logprob, got[1].logprob != 0.0) == (0.0, True)


@on_each_device
@pytest.mark.parametrize("count", [1, 9, NARROW, NARROW + 1])
def test_the_largest_come_first_and_of_equals_the_smaller_id(device: str, count: int) -> None:
    values = np.round(logits_of(3, 2000, scale=2.0))
    values[:, ::5] *= -0.0
    values[1, ::3] = -np.inf
    largest, ids = largest_first(torch.from_numpy(values).to(device), count)
    expected = np.argsort(-values, axis=1, kind="stable")[:, :count]
    assert ids.tolist() == expected.tolist()
    assert largest.tolist() == np.take_along_axis(values, expected, axis=1).tolist()


def test_a_batch_without_rows_draws_nothing() -> None:
    assert drawn_on("cpu", logits_of(0, 7), []) == []
