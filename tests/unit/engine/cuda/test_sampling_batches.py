"""What only shows in batches drawn on the device: rows are independent, and the host never waits for a value."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loraserve.engine.cuda.sampling import NARROW, draw, prepare, sampled
from loraserve.engine.schedule.events import Sampled, SequenceStep
from loraserve.messages.sampling import SamplingParams

EOS = (1,)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
    ),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
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


def one_of_each(seed: int = 0) -> list[SequenceStep]:
    return [row((3, 4, 4, 5), prompt=2, name=name, seed=seed, **params) for name, params in KINDS.items()]


def logits_of(rows: int, vocab: int) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))


def drawn_on(device: str, logits: torch.Tensor, steps: Sequence[SequenceStep]) -> list[Sampled]:
    drawn = draw(logits.to(device), prepare(steps, logits.shape[1], EOS, torch.device(device)))
    return sampled(steps, *(part if part is None else part.cpu().numpy() for part in drawn))


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_draws_the_same_in_any_batch(device: str, dtype: torch.dtype) -> None:
    steps, count = one_of_each(), len(KINDS)
    logits = logits_of(count, 5000).to(dtype)
    together = drawn_on(device, logits, steps)
    assert together == [drawn_on(device, logits[[i]], [steps[i]])[0] for i in range(count)]
    order = np.random.default_rng(0).permutation(count).tolist()
    shuffled = drawn_on(device, logits[order], [steps[i] for i in order])
    assert [shuffled[order.index(i)] for i in range(count)] == together
    assert together == drawn_on(device, logits.float(), steps)


@on_each_device
@pytest.mark.parametrize("kind", ["greedy", "plain", "top_k", "top_p"])
def test_a_row_among_many_of_its_kind_sums_to_the_same_bit(device: str, kind: str) -> None:
    """Kernels split their sums by the shape of the whole: sums of floats differ then, and some log-probabilities."""
    logits = logits_of(8, 50_000).mul(0.2)
    logits[:, 7] += 11  # about as likely as all others together: its log-probability shows the last bit of the sum
    step = row(seed=3, logprobs=20, **KINDS[kind])
    many = drawn_on(device, logits, [step] * 8)
    assert many == [drawn_on(device, values.unsqueeze(0), [step])[0] for values in logits]


class Recorded(TorchDispatchMode):
    """Notes what is called, and fails where a call would have the host wait for the device."""

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
def test_nothing_waits_for_the_device(dtype: torch.dtype) -> None:
    steps = one_of_each()
    logits = logits_of(len(steps), 2000).to(dtype)
    with Recorded() as recorded:
        draw(logits, prepare(steps, 2000, EOS, torch.device("cpu")))
    assert {"sort", "topk", "searchsorted", "scatter_add_"} <= set(recorded.names)


@pytest.mark.parametrize(
    "wait",
    [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool(x.any())],
    ids=["item", "mask", "nonzero", "bool"],
)
def test_a_wait_would_be_noticed(wait: Any) -> None:
    with pytest.raises(AssertionError), Recorded():
        wait(torch.arange(3))


def test_shapes_are_known_before_any_value_is() -> None:
    """Tensors of the meta device have shapes alone: what asked for a value would raise."""
    steps, meta = one_of_each(), torch.device("meta")
    with Recorded() as recorded:
        inputs = prepare(steps, 2000, EOS, meta)
        drawn = draw(torch.empty(len(steps), 2000, device=meta), inputs)
    assert recorded.copies_between_devices == 1, "all inputs share one"
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
    with Recorded() as recorded:
        draw(logits, inputs)
    assert recorded.names == ["argmax"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_cuda_itself_sees_no_synchronisation() -> None:
    steps, cuda = one_of_each(), torch.device("cuda")
    logits = logits_of(len(steps), 2000).to(cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw(logits, prepare(steps, 2000, EOS, cuda))
    finally:
        torch.cuda.set_sync_debug_mode("default")
