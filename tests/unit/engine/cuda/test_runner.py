"""The CUDA runner's refusals, its slots, what it draws, and steps that overlap or fail."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from loraserve.adapter.pack import Slab, pack_peft
from loraserve.config import EngineConfig
from loraserve.engine.compute.runner import CpuRunner
from loraserve.engine.schedule.events import PENDING_TOKEN, SequenceStep, StepBatch
from loraserve.errors import ConfigError
from loraserve.messages.sampling import SamplingParams
from loraserve.testing.tiny_model import write_peft_adapter

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
    """One sequence's part of a step, all of it in one block."""
    fields = {"sampling": GREEDY, "prompt_length": len(PROMPT), **fields}
    return SequenceStep(request_id=name, tokens=tokens, start=start, blocks=(block,), **fields)


def step(runner: Any, *parts: SequenceStep) -> dict[str, int]:
    result = runner.submit(StepBatch(step_id=3, sequences=parts)).result()
    assert result.step_id == 3
    assert result.duration_s > 0.0
    return {drawn.request_id: drawn.token for drawn in result.sampled}


def failing(runner: Any, name: str) -> None:
    """A step whose tokens have no block."""
    with pytest.raises(IndexError):
        step(runner, part(name, (1,), 1000, 0))


@pytest.fixture
def slab(make_cuda_runner: Make, tmp_path: Path) -> Slab:
    """Strong enough that its tokens are not the base model's."""
    shape = make_cuda_runner().shape
    return pack_peft(write_peft_adapter(tmp_path / "peft", shape, rank=8, strength=4.0), shape, "float32", 64)


def logits(runner: Any, slot: int) -> torch.Tensor:
    found: torch.Tensor = runner.logits(StepBatch(step_id=0, sequences=(part("r", (7,), 0, 1, slot=slot),)))
    return found


def test_a_slab_is_used_once_it_is_installed_and_until_it_is_removed(make_cuda_runner: Make, slab: Slab) -> None:
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


def test_a_slot_that_changes_hands_before_the_next_step_is_its_last_owners(make_cuda_runner: Make, slab: Slab) -> None:
    runner = make_cuda_runner()
    runner.pool.write(0, slab.data)
    runner.install(1, slab.header, 0)
    adapted = logits(runner, 1)
    runner.remove(1)
    runner.install(1, slab.header, 0)
    assert torch.equal(logits(runner, 1), adapted)


def of_another_dtype(header: Any) -> Any:
    return msgspec.structs.replace(header, dtype="bfloat16")


def of_another_model(header: Any) -> Any:
    return msgspec.structs.replace(header, shape=msgspec.structs.replace(header.shape, vocab=1))


def of_a_larger_rank(header: Any) -> Any:
    return msgspec.structs.replace(header, rank=9)


REFUSED: list[tuple[Callable[[Any], Any], int, str]] = [
    (of_another_dtype, 0, r"slab is bfloat16, engine\.slab_dtype is float32; register the adapter again"),
    (of_another_model, 0, r"slab is for .*, this model is .*; register the adapter again"),
    (of_a_larger_rank, 0, r"slab has rank 9, engine\.max_rank is 8; raise it"),
    (lambda header: header, 1, r"slab of \d+ elements at \d+ is outside \d+"),
    (lambda header: header, -(1 << 40), r"slab of \d+ elements at -\d+ is outside \d+"),
]
"""(what is changed of a slab that fits, how far behind the pool's end it would end, what is said)"""


def test_what_cannot_be_used_is_refused_and_leaves_the_slot_as_it_was(make_cuda_runner: Make, slab: Slab) -> None:
    runner = make_cuda_runner()
    runner.pool.write(0, slab.data)
    runner.install(0, slab.header, 0)
    before = logits(runner, 0)
    for change, past_the_end, text in REFUSED:
        with pytest.raises(ValueError, match=text):
            runner.install(0, change(slab.header), runner.pool_elements - slab.header.elements + past_the_end)
        assert torch.equal(logits(runner, 0), before), text


def test_every_way_to_draw_draws_what_the_cpu_engine_draws(
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
    assert len({tuple(tokens) for tokens in drawn[0].values()}) == len(SAMPLED), "they must differ"


def test_log_probabilities_are_the_cpu_engines(make_cuda_runner: Make, make_runner: Callable[..., CpuRunner]) -> None:
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


def test_a_step_may_be_submitted_before_the_one_it_goes_on_from_is_looked_at(make_cuda_runner: Make) -> None:
    apart = make_cuda_runner()
    first = step(apart, part("a", PROMPT, 0, 0), part("b", (8, 9), 0, 1))
    second = step(apart, part("b", (first["b"],), 2, 1))

    runner = make_cuda_runner()
    prompts = StepBatch(step_id=0, sequences=(part("a", PROMPT, 0, 0), part("b", (8, 9), 0, 1)))
    # Only the second of the two goes on: its token is no longer in the row that its part is in.
    ahead = StepBatch(step_id=1, sequences=(part("b", (PENDING_TOKEN,), 2, 1, output_index=1),))
    waiting = [runner.submit(prompts), runner.submit(ahead)]
    results = [pending.result() for pending in waiting]
    assert [result.step_id for result in results] == [0, 1]
    assert {s.request_id: s.token for s in results[0].sampled} == first
    assert {s.request_id: s.token for s in results[1].sampled} == second


def test_a_step_of_unfinished_prompts_brings_no_tokens(make_cuda_runner: Make) -> None:
    whole = step(make_cuda_runner(), part("a", PROMPT, 0, 0))
    runner = make_cuda_runner()
    assert step(runner, part("a", PROMPT[:2], 0, 0, sample=False), part("b", (8,), 0, 1, sample=False)) == {}
    assert step(runner, part("a", PROMPT[2:], 2, 0), part("b", (9,), 1, 1, sample=False)) == whole


@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_step_that_fails_takes_none_along(make_cuda_runner: Make, steps_before: int) -> None:
    runner = make_cuda_runner()
    expected = step(make_cuda_runner(), part("b", PROMPT, 0, 1))
    for _ in range(steps_before):
        step(runner, part("c", PROMPT, 0, 2), part("a", PROMPT, 0, 0))
    failing(runner, "a")
    drawn = step(runner, part("a", (PENDING_TOKEN,), 3, 0), part("b", PROMPT, 0, 1))
    assert 0 <= drawn["a"] < runner.shape.vocab, "any token will do"
    assert drawn["b"] == expected["b"]


def test_what_changed_before_a_step_that_fails_is_not_lost(make_cuda_runner: Make, slab: Slab) -> None:
    runner, other = make_cuda_runner(), make_cuda_runner()
    for each in (runner, other):
        each.pool.write(0, slab.data)
        each.install(0, slab.header, 0)
    failing(runner, "a")
    assert torch.equal(logits(runner, 0), logits(other, 0))


def test_a_change_that_could_not_be_made_is_made_before_the_next_step(
    make_cuda_runner: Make, slab: Slab, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, other = make_cuda_runner(), make_cuda_runner()
    for each in (runner, other):
        each.pool.write(0, slab.data)
        each.install(0, slab.header, 0)

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("loraserve.kernels.lora.tables._send", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            logits(runner, 0)
    assert torch.equal(logits(runner, 0), logits(other, 0)), "it must not compute as the base model"


def test_warming_up_changes_nothing_and_says_what_it_does(make_cuda_runner: Make) -> None:
    runner = make_cuda_runner(max_step_tokens=3, max_running=2)
    before, said = logits(runner, -1), []
    runner.warm_up(said.append)
    assert [text for text in said if "compiling" in text] == [
        f"compiling kernels for steps of {size} tokens" for size in (1, 2, 4)
    ]
    assert torch.equal(logits(runner, -1), before)


def test_memory_that_runs_out_while_warming_up_names_the_setting_to_lower(
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
def test_too_little_memory_names_the_setting_and_what_is_enough(make_cuda_runner: Make) -> None:
    with pytest.raises(ConfigError, match=r"engine\.kv_bytes=1000 holds not one block; give at least \d+") as refused:
        make_cuda_runner(kv_bytes=1000)
    enough = int(str(refused.value).split("give at least ")[1])
    assert make_cuda_runner(kv_bytes=enough).kv_blocks == 1


def test_what_there_is_room_for_is_said(make_cuda_runner: Make) -> None:
    said: list[str] = []
    runner = make_cuda_runner(progress=said.append)
    assert any(text.startswith(f"KV cache for {runner.kv_blocks * 16} tokens; adapter pool of") for text in said)
    assert any(text.startswith("attention: ") for text in said)
    assert runner.max_positions == min(512, runner.kv_blocks * 16)
