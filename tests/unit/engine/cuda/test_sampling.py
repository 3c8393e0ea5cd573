"""Sampling on the device. The CPU's sampler, which computes row by row, is the definition.

Rows of a batch must not depend on each other, and the host must never wait for a value from the device.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

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
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 0.9},
    "top_k": {"top_k": 40},
    "large top_k": {"top_k": NARROW + 1},
    "top_p": {"top_p": 0.9, "temperature": 1.3},
    "min_p": {"min_p": 0.02},
    "all filters": {"top_k": 50, "top_p": 0.8, "min_p": 0.01},
    "penalized": {"frequency_penalty": 0.3, "presence_penalty": 0.5, "repetition_penalty": 1.3},
    "early": {"min_tokens": 5, "stop_token_ids": (2, 4)},
    "logprobs": {"logprobs": 3},
    "penalized logprobs": {"logprobs": 0, "repetition_penalty": 2.0, "temperature": 0.0},
}


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
    assert torch.equal(values.nan_to_num(), before.nan_to_num()), "the caller's logits were changed"
    return downloaded(steps, drawn)


def downloaded(steps: Sequence[SequenceStep], drawn: Drawn) -> list[Sampled]:
    return sampled(steps, *(part if part is None else part.cpu().numpy() for part in drawn))


def defined(logits: Logits, steps: Sequence[SequenceStep]) -> list[Sampled]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sampler.sample(logits.copy(), steps, EOS)


def assert_tokens_as_defined(logits: Logits, steps: Sequence[SequenceStep], got: list[Sampled]) -> int:
    """Check the tokens, and return the number of rows in which rounding gave another token than the CPU."""
    different = 0
    for values, step, ours, expected in zip(logits, steps, got, defined(logits, steps), strict=True):
        if ours.token != expected.token:
            assert rounding_decides(values, step, ours.token, expected.token), (step.sampling, ours, expected)
            different += 1
    return different


def rounding_decides(logits: Logits, step: SequenceStep, ours: int, expected: int) -> bool:
    """Return whether rounding decides on which side of the tokens' boundary ``u`` lies, or where a filter cuts."""
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
    """Draw any row. Each parameter often has its default, so that batches mix all kinds of rows."""

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
def test_every_row_equals_the_cpus_sample(
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
def test_rounding_decides_at_most_one_percent_of_draws(device: str) -> None:
    different, draws = 0, 60 * len(FILTERS)
    for seed in range(60):
        steps, logits = [row(seed=seed, **params) for params in FILTERS], logits_of(len(FILTERS), 3000, seed)
        different += assert_tokens_as_defined(logits, steps, drawn_on(device, logits, steps))
    assert different <= 0.01 * draws


@on_each_device
@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_k": 2000}, {"top_p": 0.25}, {"min_p": 1.0}])
def test_among_equal_tokens_the_cpus_token_is_drawn(device: str, params: dict[str, Any]) -> None:
    steps = [row(seed=seed, **params) for seed in range(200)]
    for vocab in (600, 2048, 2500):
        logits = np.full((200, vocab), -1.5, dtype=np.float32)
        got = [s.token for s in drawn_on(device, logits, steps)]
        assert got == [s.token for s in defined(logits, steps)]
        assert max(got) < params.get("top_k", vocab) * params.get("top_p", 1.0)


@on_each_device
@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0}])
@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_rows_that_are_not_finite_get_the_cpus_token(device: str, params: dict[str, Any], special: float) -> None:
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
def test_a_draw_on_the_boundary_of_two_tokens_takes_the_later_one(u: float, tokens: list[int]) -> None:
    logits = torch.zeros(3, 7)
    logits[:, [0, 2, 5]] = -torch.inf
    steps = [row(), row(top_k=6), row(top_p=0.9999)]
    inputs = prepare(steps, 7, EOS, torch.device("cpu"))
    for draws in (inputs.plain, inputs.narrow, inputs.wide):
        draws.u.fill_(u)
    assert draw(logits, inputs).tokens.tolist() == tokens


@pytest.mark.parametrize("vocab", [1, 7, 256, 3000, 40_001, MAX_VOCAB])
def test_u_never_points_beyond_the_last_token(vocab: int) -> None:
    """The product of ``u`` and the sum is rounded up for some of these sizes."""
    inputs = prepare([row(), row(top_p=0.999999)], vocab, EOS, torch.device("cpu"))
    for draws in (inputs.plain, inputs.wide):
        draws.u.fill_(1 - 2.0**-53)
    logits = torch.full((2, vocab), -torch.inf)
    logits[:, : (vocab + 1) // 2] = torch.rand((vocab + 1) // 2, generator=torch.Generator().manual_seed(0)) / 100
    plain, wide = draw(logits, inputs).tokens.tolist()
    assert plain == (vocab + 1) // 2 - 1
    assert wide < (vocab + 1) // 2


@on_each_device
def test_greedy_rows_respect_penalties_and_forbidden_tokens(device: str) -> None:
    logits = np.array([[0.0, 9.0, 8.0, 1.0], [0.0, 1.0, 3.0, 2.5], [0.0, -1.0, 4.0, 3.0]], dtype=np.float32)
    steps = [
        row(index=1, min_tokens=2, stop_token_ids=(2, 99, -1), temperature=0.0),
        row((3, 2, 2), frequency_penalty=0.4, temperature=0.0),
        row((2,), repetition_penalty=2.0, temperature=0.0),
    ]
    assert [s.token for s in drawn_on(device, logits, steps)] == [3, 3, 3]
    later = [
        row(index=2, min_tokens=2, temperature=0.0),
        row((3, 2, 2), prompt=3, frequency_penalty=2.0, temperature=0.0),
    ]
    assert [s.token for s in drawn_on(device, logits[:2], later)] == [1, 2]


@on_each_device
@pytest.mark.parametrize("asked", [0, 1, 5, 700, NARROW + 7])
def test_logprobs_are_those_of_the_unmodified_logits(device: str, asked: int) -> None:
    logits = logits_of(1, 1500)
    logits[0, 7] = logits[0, 3] = logits.max() + 1
    step = row((3, 3), seed=4, temperature=0.5, top_k=50, frequency_penalty=1.0, logprobs=asked)
    (got,) = drawn_on(device, logits, [step])
    exact = torch.log_softmax(torch.from_numpy(logits[0]).double(), dim=0)
    best = torch.sort(exact, descending=True, stable=True).indices[:asked].tolist()
    assert [token for token, _ in got.top] == best
    for token, logprob in ((got.token, got.logprob), *got.top):
        assert logprob == pytest.approx(float(exact[token]), abs=1e-5)


def test_each_row_gets_the_requested_number_of_top_tokens() -> None:
    steps = [row(logprobs=asked) for asked in (None, 0, 2, 9)]
    logits = logits_of(4, 7)
    got = drawn_on("cpu", logits, steps)
    assert [len(s.top) for s in got] == [len(s.top) for s in defined(logits, steps)] == [0, 0, 2, 7]
    assert (got[0].logprob, got[1].logprob != 0.0) == (0.0, True)


@on_each_device
@pytest.mark.parametrize("count", [1, 9, NARROW, NARROW + 1])
def test_the_largest_values_come_first_and_ties_by_smaller_id(device: str, count: int) -> None:
    values = np.round(logits_of(3, 2000, scale=2.0))
    values[:, ::5] *= -0.0
    values[1, ::3] = -np.inf
    largest, ids = largest_first(torch.from_numpy(values).to(device), count)
    expected = np.argsort(-values, axis=1, kind="stable")[:, :count]
    assert ids.tolist() == expected.tolist()
    assert largest.tolist() == np.take_along_axis(values, expected, axis=1).tolist()


def test_a_batch_without_rows_draws_nothing() -> None:
    assert drawn_on("cpu", logits_of(0, 7), []) == []


def one_of_each(seed: int = 0) -> list[SequenceStep]:
    return [row((3, 4, 4, 5), prompt=2, name=name, seed=seed, **params) for name, params in KINDS.items()]


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_sample_in_any_batch(device: str, dtype: torch.dtype) -> None:
    steps, count = one_of_each(), len(KINDS)
    logits = torch.from_numpy(logits_of(count, 5000)).to(dtype)
    together = drawn_on(device, logits, steps)
    assert together == [drawn_on(device, logits[[i]], [steps[i]])[0] for i in range(count)]
    order = np.random.default_rng(0).permutation(count).tolist()
    shuffled = drawn_on(device, logits[order], [steps[i] for i in order])
    assert [shuffled[order.index(i)] for i in range(count)] == together
    assert together == drawn_on(device, logits.float(), steps)


@on_each_device
@pytest.mark.parametrize("kind", ["greedy", "plain", "top_k", "top_p"])
def test_a_row_in_a_batch_of_its_kind_has_the_same_bits_as_alone(device: str, kind: str) -> None:
    """A kernel that splits sums by the shape of the batch would change the last bits of log-probabilities."""
    logits = torch.from_numpy(logits_of(8, 50_000)).mul(0.2)
    logits[:, 7] += 11  # As likely as all others together, so that its log-probability shows the last bit of the sum.
    step = row(seed=3, logprobs=20, **KINDS[kind])
    many = drawn_on(device, logits, [step] * 8)
    assert many == [drawn_on(device, values.unsqueeze(0), [step])[0] for values in logits]


class WaitDetector(TorchDispatchMode):
    """Records the called operations, and fails on those that would make the host wait for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.copies_between_devices = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.names.append(name)
        self.copies_between_devices += name == "_to_copy" and (kwargs or {}).get("device") is not None
        by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        assert not by_mask, f"{name} by a mask"
        assert not name.startswith(self.WAITING), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_does_not_wait_for_the_device(dtype: torch.dtype) -> None:
    steps = one_of_each()
    logits = torch.from_numpy(logits_of(len(steps), 2000)).to(dtype)
    with WaitDetector() as recorded:
        draw(logits, prepare(steps, 2000, EOS, torch.device("cpu")))
    assert {"sort", "topk", "searchsorted", "scatter_add_"} <= set(recorded.names)


@pytest.mark.parametrize(
    "wait",
    [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool(x.any())],
    ids=["item", "mask", "nonzero", "bool"],
)
def test_a_wait_is_detected(wait: Any) -> None:
    with pytest.raises(AssertionError), WaitDetector():
        wait(torch.arange(3))


def test_shapes_do_not_depend_on_values() -> None:
    """Tensors of the meta device have no values, so reading one raises."""
    steps, meta = one_of_each(), torch.device("meta")
    with WaitDetector() as recorded:
        inputs = prepare(steps, 2000, EOS, meta)
        drawn = draw(torch.empty(len(steps), 2000, device=meta), inputs)
    assert recorded.copies_between_devices == 1, "the inputs were not sent in one copy"
    assert (drawn.tokens.shape, drawn.tokens.dtype) == ((len(steps),), torch.int64)
    assert drawn.logprobs is not None
    assert drawn.top_tokens is not None
    assert drawn.top_logprobs is not None
    assert (drawn.logprobs.shape, drawn.logprobs.dtype) == ((len(steps),), torch.float32)
    assert (drawn.top_tokens.shape, drawn.top_tokens.dtype) == ((len(steps), 3), torch.int64)
    assert (drawn.top_logprobs.shape, drawn.top_logprobs.dtype) == ((len(steps), 3), torch.float32)


def test_a_greedy_batch_costs_one_argmax() -> None:
    steps = [row(temperature=0.0, top_k=5, top_p=0.5)] * 3
    inputs = prepare(steps, 100, EOS, torch.device("cpu"))
    logits = torch.zeros(3, 100)
    with WaitDetector() as recorded:
        draw(logits, inputs)
    assert recorded.names == ["argmax"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_cuda_reports_no_synchronisation() -> None:
    steps, cuda = one_of_each(), torch.device("cuda")
    logits = torch.from_numpy(logits_of(len(steps), 2000)).to(cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw(logits, prepare(steps, 2000, EOS, cuda))
    finally:
        torch.cuda.set_sync_debug_mode("default")
