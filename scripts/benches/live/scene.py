"""The inputs of every policy: a small random model, adapters of mixed ranks and one workload."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from loraserve.cost.derived import ITEM_BYTES, rank_elements
from loraserve.model_shape import ModelShape
from loraserve.sim.traces import read_trace
from loraserve.sim.workload import SimRequest, TraceSource, Workload, WorkloadShape, draw_workload, trace_workload
from loraserve.testing.tiny_model import write_peft_adapter, write_tiny_model
from loraserve.testing.tiny_tokenizer import write_tiny_tokenizer

ENGINES = 4
ADAPTERS = 20
MODEL_SIZES = {
    # Only printable ASCII tokens: each token is text by itself, so that the first is visible when it is generated.
    "vocab_size": 94,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}
PROMPT_TOKENS = 160.0
OUTPUT_TOKENS = 16.0
LONGEST_TOKENS = 512
"""Of prompt and output, so that no single request occupies an engine for seconds."""
ENGINE_SETTINGS = (
    "engine.threads=1",
    "engine.prefix_cache=false",
    "engine.max_running=16",
    "engine.max_step_tokens=256",
    f"engine.kv_bytes={64 << 20}",
    f"engine.pool_bytes={80 << 20}",
)
"""The pool has room for any quarter of the adapters, which the baselines assign to an engine, but not for all of them:
they need 103 MiB in extents, and a plan may fill nine tenths of a pool."""


class Scene(NamedTuple):
    """The model, the workload and its adapters as PEFT folders by name."""

    model: Path
    shape: ModelShape
    adapters: dict[str, Path]
    workload: Workload


def make_scene(folder: Path, requests: int, trace: str, seed: int) -> Scene:
    """Write model and adapters. Raises ConfigError if the trace cannot be used."""
    model = folder / "policies-model"
    shape = write_tiny_model(model, "llama", **MODEL_SIZES)
    write_tiny_tokenizer(model)
    workload = make_workload(requests, rank_elements(shape) * ITEM_BYTES, trace, seed)
    adapters = {}
    for number, adapter in enumerate(workload.adapters):
        path = folder / "policies-adapters" / f"{number}"
        adapters[adapter.name] = write_peft_adapter(path, shape, adapter.rank, seed=number, strength=0.05)
    return Scene(model, shape, adapters, workload)


def make_workload(requests: int, slab_bytes_per_rank: int, trace: str = "", seed: int = 0) -> Workload:
    """Return the workload of a trace, or Poisson arrivals with Zipf popularity, with lengths that fit this machine.

    Raises:
        ConfigError: The trace cannot be used.
    """
    if trace:
        source = TraceSource(path=trace, adapters=ADAPTERS, requests=requests, seed=seed)
        drawn = trace_workload(read_trace(trace), source, slab_bytes_per_rank)
    else:
        shape = WorkloadShape(lengths="prefill-heavy", adapters=ADAPTERS, requests=requests, seed=seed)
        drawn = draw_workload(shape, slab_bytes_per_rank)
    return shortened(drawn, PROMPT_TOKENS, OUTPUT_TOKENS, LONGEST_TOKENS)


def shortened(workload: Workload, prompt_tokens: float, output_tokens: float, longest_tokens: int) -> Workload:
    """Scale prompts and outputs to these means. No prompt with its output gets longer than ``longest_tokens``."""
    requests = workload.requests
    prompt = prompt_tokens * len(requests) / sum(r.prompt_tokens for r in requests)
    output = output_tokens * len(requests) / sum(r.output_tokens for r in requests)
    scaled = [(r, max(1, round(r.prompt_tokens * prompt)), max(2, round(r.output_tokens * output))) for r in requests]
    return Workload(
        workload.name,
        workload.adapters,
        tuple(SimRequest(r.time_s, r.adapter, *_cut(p, o, longest_tokens)) for r, p, o in scaled),
    )


def mean_prompt_tokens(workload: Workload) -> int:
    return round(sum(r.prompt_tokens for r in workload.requests) / len(workload.requests))


def _cut(prompt: int, output: int, longest: int) -> tuple[int, int]:
    prompt = min(prompt, longest * 3 // 4)
    return prompt, min(output, longest - prompt)


def prompt_of(number: int, tokens: int, vocab: int) -> Sequence[int]:
    """Return a prompt that begins differently from all others, so that no prefix cache applies."""
    begin = (number % vocab, number // vocab % vocab, number // vocab**2 % vocab)
    return (*begin, *((number + 7 * place) % vocab for place in range(tokens)))[:tokens]
