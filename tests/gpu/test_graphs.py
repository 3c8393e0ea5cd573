"""Captured CUDA graphs: a replay computes the batch planned last, as a runner without graphs would."""

import random
from pathlib import Path
from typing import Any

import torch

from loraserve.adapter.format import make_layout
from loraserve.config import EngineConfig
from loraserve.engine.schedule.events import SequenceStep, StepBatch
from loraserve.messages.sampling import SamplingParams
from loraserve.model_shape import MODULES, SLICES, ModelShape
from loraserve.testing.tiny_model import write_tiny_model

SHAPE = ModelShape(layers=2, hidden=512, heads=8, kv_heads=2, head_dim=64, ffn=1024, vocab=512)
RANKS = (8, 128, 16, 3, 64, 33)
TOKENS = 24


def planned() -> tuple[Any, ...]:
    """Return (tables, pool, work, slots): six adapters on the GPU, and the work lists of a step of TOKENS tokens."""
    from loraserve.kernels.lora.tables import AdapterTables
    from loraserve.kernels.lora.work import LoraWork, Workspace

    rows = [[(rank,) * len(SLICES[m]) for _ in range(SHAPE.layers) for m in MODULES] for rank in RANKS]
    headers = [make_layout(SHAPE, "bfloat16", row, [(0.5,) * len(r) for r in row]) for row in rows]
    pool = torch.randn(sum(h.elements for h in headers), device="cuda", dtype=torch.bfloat16) * 0.05
    tables = AdapterTables(SHAPE, len(RANKS), "cuda")
    start = 0
    for slot, header in enumerate(headers):
        tables.install(slot, header, start)
        start += header.elements
    work = LoraWork(tables, Workspace(tables, TOKENS, 128, torch.bfloat16), TOKENS)
    return tables, pool, work, torch.full((TOKENS,), -1, dtype=torch.int32, device="cuda")


def test_one_graph_serves_batches_of_more_and_fewer_groups() -> None:
    from loraserve.kernels.lora.gpu import add_lora

    tables, pool, work, slots = planned()
    x = torch.randn(TOKENS, SHAPE.hidden, device="cuda", dtype=torch.bfloat16)
    y = torch.zeros(TOKENS, sum(SHAPE.out_features("qkv")), device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        work.plan(slots)
        add_lora(y, x, pool, tables, work, 1, 0)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        choose = random.Random(0)
        for batch in (
            [0] * TOKENS,
            list(range(6)) * 4,
            [-1] * TOKENS,
            [choose.randrange(-1, 6) for _ in range(TOKENS)],
        ):
            slots.copy_(torch.tensor(batch))
            y.zero_()
            graph.replay()
            replayed = y.clone()
            y.zero_()
            step()
            assert torch.equal(replayed, y), "the same batch has the same bits, replayed or launched"
            assert bool(y.any()) == any(slot >= 0 for slot in batch)


def decode(runner: Any, sequences: int, steps: int) -> list[list[int]]:
    """Return the greedy tokens of sequences whose prompts have one token."""
    sampling = SamplingParams(max_tokens=steps, temperature=0.0)
    outputs: list[list[int]] = [[i + 1] for i in range(sequences)]
    for step in range(steps):
        parts = tuple(
            SequenceStep(
                request_id=str(i), tokens=(tokens[-1],), start=step, blocks=(i,), sampling=sampling, prompt_length=1
            )
            for i, tokens in enumerate(outputs)
        )
        for i, drawn in enumerate(runner.submit(StepBatch(step_id=step, sequences=parts)).result().sampled):
            outputs[i].append(drawn.token)
    return outputs


def small_engine(max_running: int, memory_fraction: float = 0.1) -> EngineConfig:
    return EngineConfig(
        slab_dtype="float32", max_running=max_running, max_adapters=2, max_step_tokens=64, max_rank=16,
        memory_fraction=memory_fraction,
    )  # fmt: skip


def test_a_runner_with_graphs_draws_what_it_draws_without(tmp_path: Path) -> None:
    from loraserve.engine.cuda.runner import load_cuda_runner

    write_tiny_model(tmp_path, "llama", 0)
    eager, captured = (
        load_cuda_runner(
            tmp_path, small_engine(max_running=8, memory_fraction=tenths / 10), torch.device("cuda"), print
        )
        for tenths in (1, 2)  # the second beside the first
    )
    captured.warm_up(print)
    for sequences in (1, 3, 8):
        assert decode(captured, sequences, 8) == decode(eager, sequences, 8)


def test_launching_a_captured_step_does_not_wait_for_the_gpu(tmp_path: Path) -> None:
    from loraserve.engine.cuda.runner import load_cuda_runner

    write_tiny_model(tmp_path, "llama", 0)
    runner = load_cuda_runner(tmp_path, small_engine(max_running=4), torch.device("cuda"), print)
    runner.warm_up(print)
    sampling = SamplingParams(max_tokens=8, temperature=0.7, top_p=0.9)
    step = SequenceStep(request_id="0", tokens=(1,), start=0, blocks=(0,), sampling=sampling, prompt_length=1)
    runner.step(StepBatch(step_id=0, sequences=(step,)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = runner.submit(StepBatch(step_id=1, sequences=(step,)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(pending.result().sampled) == 1
