"""The CUDA runner: slots, refusals, sampled tokens, and steps that overlap or fail."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from loraserve.adapter.pack import Slab
from loraserve.config import EngineConfig
from loraserve.engine.compute.runner import CpuRunner
from loraserve.engine.schedule.events import PENDING_TOKEN, SequenceStep, StepBatch
from loraserve.errors import ConfigError
from loraserve.messages.sampling import SamplingParams

Make = Callable[..., Any]
PROMPT = (5, 6, 7)
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
SAMPLED = {
    "plain": SamplingParams(max_tokens=8, temperature=0.8, seed=11),
    "top_p": SamplingParams(max_tokens=8, temperature=1.3, top_p=0.7, seed=12),
    "top_k": SamplingParams(max_tokens=8, temperature=1.5, top_k=9, seed=13),
    "min_p": SamplingParams(max_tokens=8, temperature=1.1, min_p=0.05, seed=14),
    "penalties": SamplingParams(
        max_tokens=8, temperature=0.9, seed=15, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25
    ),
    "greedy": SamplingParams(max_tokens=8, temperature=0.0, min_tokens=2, logprobs=3),
}


def part(name: str, tokens: tuple[int, ...], start: int, block: int, **fields: Any) -> SequenceStep:
    """Return one sequence's part of a step, within one block."""
    fields = {"sampling": GREEDY, "prompt_length": len(PROMPT), **fields}
    return SequenceStep(request_id=name, tokens=tokens, start=start, blocks=(block,), **fields)


def step(runner: Any, *parts: SequenceStep) -> dict[str, int]:
    result = runner.submit(StepBatch(step_id=3, sequences=parts)).result()
    assert result.step_id == 3
    assert result.duration_s > 0.0
    return {drawn.request_id: drawn.token for drawn in result.sampled}


def run_failing_step(runner: Any, name: str) -> None:
    """Run a step that fails, as its tokens have no block."""
    with pytest.raises(IndexError):
        step(runner, part(name, (1,), 1000, 0))


@pytest.fixture
def slab(strong_slab: Callable[[str], Slab]) -> Slab:
    return strong_slab("small")


def logits(runner: Any, slot: int) -> torch.Tensor:
    found: torch.Tensor = runner.logits(StepBatch(step_id=0, sequences=(part("r", (7,), 0, 1, slot=slot),)))
    return found


def test_a_slab_is_used_from_install_to_remove(make_cuda_runner: Make, slab: Slab) -> None:
    runner = make_cuda_runner()
    base = logits(runner, -1)
    assert torch.equal(logits(runner, 2), base), "a slot without an adapter is the base model"
    last = runner.pool_elements - slab.header.elements
    runner.pool.write(last * 4, slab.data)
    runner.install(2, slab.header, last)
    assert not torch.equal(logits(runner, 2).argmax(), base.argmax())
    assert torch.equal(logits(runner, -1), base)
    runner.remove(2)
    assert torch.equal(logits(runner, 2), base)


def test_the_last_change_of_a_slot_before_a_step_counts(make_cuda_runner: Make, slab: Slab) -> None:
    runner = make_cuda_runner()
    runner.pool.write(0, slab.data)
    runner.install(1, slab.header, 0)
    adapted = logits(runner, 1)
    runner.remove(1)
    runner.install(1, slab.header, 0)
    assert torch.equal(logits(runner, 1), adapted)


def with_other_dtype(header: Any) -> Any:
    return msgspec.structs.replace(header, dtype="bfloat16")


def with_other_model(header: Any) -> Any:
    return msgspec.structs.replace(header, shape=msgspec.structs.replace(header.shape, vocab=1))


def with_larger_rank(header: Any) -> Any:
    return msgspec.structs.replace(header, rank=9)


REFUSED: list[tuple[Callable[[Any], Any], int, str]] = [
    (with_other_dtype, 0, r"slab is bfloat16, engine\.slab_dtype is float32; register the adapter again"),
    (with_other_model, 0, r"slab is for .*, this model is .*; register the adapter again"),
    (with_larger_rank, 0, r"slab has rank 9, engine\.max_rank is 8; raise it"),
    (lambda header: header, 1, r"slab of \d+ elements at \d+ is outside \d+"),
    (lambda header: header, -(1 << 40), r"slab of \d+ elements at -\d+ is outside \d+"),
]
"""(change of a slab that fits, elements by which it exceeds the pool, expected error)"""


def test_an_unusable_slab_is_refused_and_the_slot_does_not_change(make_cuda_runner: Make, slab: Slab) -> None:
    runner = make_cuda_runner()
    runner.pool.write(0, slab.data)
    runner.install(0, slab.header, 0)
    before = logits(runner, 0)
    for change, past_the_end, text in REFUSED:
        with pytest.raises(ValueError, match=text):
            runner.install(0, change(slab.header), runner.pool_elements - slab.header.elements + past_the_end)
        assert torch.equal(logits(runner, 0), before), text


def test_all_sampling_methods_agree_with_the_cpu_engine(
    make_cuda_runner: Make, make_runner: Callable[..., CpuRunner], helpers: Any
) -> None:
    drawn = []
    for runner in (make_cuda_runner(), make_runner("small")):
        streams = [
            helpers.Stream(name, (5 + i, 6, 7), blocks=(i,), sampling=sampling)
            for i, (name, sampling) in enumerate(SAMPLED.items())
        ]
        helpers.drive(runner, streams, 3, [3] * len(streams))
        drawn.append({stream.name: stream.output for stream in streams})
    assert drawn[0] == drawn[1]
    assert len({tuple(tokens) for tokens in drawn[0].values()}) == len(SAMPLED), "the tokens must differ"


def test_logprobs_agree_with_the_cpu_engine(make_cuda_runner: Make, make_runner: Callable[..., CpuRunner]) -> None:
    batch = StepBatch(
        step_id=0,
        sequences=(part("asks", PROMPT, 0, 0, sampling=SAMPLED["greedy"]), part("does not", PROMPT, 0, 1)),
    )
    runners = make_cuda_runner(), make_runner("small")
    (ours, silent), (theirs, _) = (runner.submit(batch).result().sampled for runner in runners)
    assert (silent.logprob, silent.top) == (0.0, ())
    assert ours.token == theirs.token
    assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
    assert [p for _, p in ours.top] == pytest.approx([p for _, p in theirs.top], abs=1e-4)


def test_a_step_can_be_submitted_before_the_result_of_the_preceding_one(make_cuda_runner: Make) -> None:
    apart = make_cuda_runner()
    first = step(apart, part("a", PROMPT, 0, 0), part("b", (8, 9), 0, 1))
    second = step(apart, part("b", (first["b"],), 2, 1))

    runner = make_cuda_runner()
    prompts = StepBatch(step_id=0, sequences=(part("a", PROMPT, 0, 0), part("b", (8, 9), 0, 1)))
    # Only the second sequence continues, so that its pending token is in another row than its part.
    ahead = StepBatch(step_id=1, sequences=(part("b", (PENDING_TOKEN,), 2, 1, output_index=1),))
    waiting = [runner.submit(prompts), runner.submit(ahead)]
    results = [pending.result() for pending in waiting]
    assert [result.step_id for result in results] == [0, 1]
    assert {s.request_id: s.token for s in results[0].sampled} == first
    assert {s.request_id: s.token for s in results[1].sampled} == second


def test_a_step_of_unfinished_prompts_samples_no_tokens(make_cuda_runner: Make) -> None:
    whole = step(make_cuda_runner(), part("a", PROMPT, 0, 0))
    runner = make_cuda_runner()
    assert step(runner, part("a", PROMPT[:2], 0, 0, sample=False), part("b", (8,), 0, 1, sample=False)) == {}
    assert step(runner, part("a", PROMPT[2:], 2, 0), part("b", (9,), 1, 1, sample=False)) == whole


@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_failed_step_does_not_fail_the_next(make_cuda_runner: Make, steps_before: int) -> None:
    runner = make_cuda_runner()
    expected = step(make_cuda_runner(), part("b", PROMPT, 0, 1))
    for _ in range(steps_before):
        step(runner, part("c", PROMPT, 0, 2), part("a", PROMPT, 0, 0))
    run_failing_step(runner, "a")
    drawn = step(runner, part("a", (PENDING_TOKEN,), 3, 0), part("b", PROMPT, 0, 1))
    assert 0 <= drawn["a"] < runner.shape.vocab, "the token is not used, but it must be valid"
    assert drawn["b"] == expected["b"]


def test_table_changes_before_a_failed_step_are_not_lost(make_cuda_runner: Make, slab: Slab) -> None:
    runner, other = make_cuda_runner(), make_cuda_runner()
    for each in (runner, other):
        each.pool.write(0, slab.data)
        each.install(0, slab.header, 0)
    run_failing_step(runner, "a")
    assert torch.equal(logits(runner, 0), logits(other, 0))


def test_a_failed_table_change_is_tried_again_before_the_next_step(
    make_cuda_runner: Make, slab: Slab, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, other = make_cuda_runner(), make_cuda_runner()
    for each in (runner, other):
        each.pool.write(0, slab.data)
        each.install(0, slab.header, 0)

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("loraserve.kernels.lora.tables._copy_in_stream_order", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            logits(runner, 0)
    assert torch.equal(logits(runner, 0), logits(other, 0)), "it must not compute as the base model"


def test_warm_up_does_not_change_outputs_and_reports_progress(make_cuda_runner: Make) -> None:
    runner = make_cuda_runner(max_step_tokens=3, max_running=2)
    before, said = logits(runner, -1), []
    runner.warm_up(said.append)
    assert [text for text in said if "compiling" in text] == [
        f"compiling kernels for steps of {size} tokens" for size in (1, 2, 4)
    ]
    assert torch.equal(logits(runner, -1), before)


def test_running_out_of_memory_during_warm_up_names_the_setting(
    make_cuda_runner: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraserve.engine.cuda import runner as runner_module

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    runner = make_cuda_runner()
    monkeypatch.setattr(runner, "warm_up", no_memory)
    monkeypatch.setattr(runner_module, "load_cuda_runner", lambda *_: runner)
    with pytest.raises(
        ConfigError, match=r"Tried to allocate 2\.00 GiB\); lower engine\.memory_fraction \(it is 0\.9\)"
    ):
        runner_module.start_cuda_runner(Path(), EngineConfig(), torch.device("cpu"), lambda text: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory is measured")
def test_too_little_memory_is_refused_with_the_least_setting(make_cuda_runner: Make) -> None:
    with pytest.raises(ConfigError, match=r"engine\.kv_bytes=1000 holds not one block; give at least \d+") as refused:
        make_cuda_runner(kv_bytes=1000)
    enough = int(str(refused.value).split("give at least ")[1])
    assert make_cuda_runner(kv_bytes=enough).kv_blocks == 1


def test_the_capacity_is_reported(make_cuda_runner: Make) -> None:
    said: list[str] = []
    runner = make_cuda_runner(progress=said.append)
    assert any(text.startswith(f"KV cache for {runner.kv_blocks * 16} tokens; adapter pool of") for text in said)
    assert any(text.startswith("attention: ") for text in said)
    assert runner.max_positions == min(512, runner.kv_blocks * 16)
