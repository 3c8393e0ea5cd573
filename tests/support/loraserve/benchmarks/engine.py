"""Time the whole engine on a GPU with a random model of Llama-3-8B's shape: ``python -m loraserve.benchmarks.engine``.

The real scheduler, runner, graphs and sampler decode a batch without adapters and with a different adapter for every
sequence, in one run. The adapters are random bytes in the pool, so nothing has to be loaded. Prints a table, then one
line of JSON.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch

from loraserve.adapter.format import SlabHeader, make_uniform_layout
from loraserve.benchmarks.lora.cases import LLAMA_3_8B
from loraserve.config import Config, EngineConfig
from loraserve.engine.cuda.runner import CudaRunner
from loraserve.engine.cuda.state import DTYPES, allocate_state, compute_dtype
from loraserve.engine.model.config import DecoderConfig, Rope
from loraserve.engine.model.linear import Linear
from loraserve.engine.model.weights import DecoderWeights, LayerWeights
from loraserve.engine.schedule.events import LoadAdapter
from loraserve.engine.setup import gpu_error
from loraserve.messages import AdapterRef
from loraserve.messages.sampling import SamplingParams
from loraserve.model_shape import MODULES, ModelShape
from loraserve.testing.engine.offline import OfflineEngine, OfflineOutput, OfflineRequest

RANKS = (8, 16, 32, 64, 128)
SEQUENCES = 64


class EngineCase(msgspec.Struct, frozen=True, kw_only=True):
    """One batch. ``ranks`` has the rank of each sequence's adapter; it is empty for a batch without adapters."""

    name: str
    ranks: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int


class EngineFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of the time while all sequences decode.

    Tokens per second by the clock, median step time on the GPU, and the share of the time that the GPU was busy.
    """

    tokens_per_s: float
    step_ms: float
    gpu_busy: float
    ttft_s: float


class RandomPoolEngine(OfflineEngine):
    """An engine whose loads read nothing: an adapter is whatever lies at its place in the pool."""

    def __init__(self, config: Config, headers: Mapping[str, SlabHeader], runner: CudaRunner) -> None:
        super().__init__(config, {}, runner)
        self._headers = dict(headers)
        self._references = {
            name: AdapterRef(name=name, version=name, rank=header.rank, slab_bytes=header.slab_bytes)
            for name, header in headers.items()
        }

    def _fill(self, load: LoadAdapter) -> None:
        header = self._headers[load.adapter.version]
        self.runner.install(load.slot, header, load.offset_bytes * header.elements // header.slab_bytes)


def cases(sequences: int, quick: bool) -> list[EngineCase]:
    """Return the batches: no adapters, one per sequence of mixed ranks, and one per sequence of the smallest rank."""
    prompt, output = (64, 32) if quick else (256, 128)
    mixed = tuple(RANKS[i % len(RANKS)] for i in range(sequences))
    ranks = {
        "none": (),
        f"{sequences} adapters, ranks 8 to 128": mixed,
        f"{sequences} adapters, rank 8": (8,) * sequences,
    }
    return [EngineCase(name=n, ranks=r, prompt_tokens=prompt, output_tokens=output) for n, r in ranks.items()]


def random_weights(config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """Return a model of small random weights on the device; norms are one."""
    shape = config.shape

    def linear(out: int, width: int) -> Linear:
        return Linear(torch.randn(out, width, dtype=dtype, device=device) * 0.02, None)

    def ones(width: int) -> torch.Tensor:
        return torch.ones(width, device=device)

    layers = [
        LayerWeights(
            input_norm=ones(shape.hidden),
            post_norm=ones(shape.hidden),
            head_norms=None,
            **{m: linear(sum(shape.out_features(m)), shape.in_features(m)) for m in MODULES},
        )
        for _ in range(shape.layers)
    ]
    embedding = torch.randn(shape.vocab, shape.hidden, dtype=dtype, device=device)
    return DecoderWeights(embedding, layers, ones(shape.hidden), linear(shape.vocab, shape.hidden))


def make_runner(shape: ModelShape, engine: EngineConfig, device: torch.device) -> CudaRunner:
    """Return a runner that is warmed up, with small random numbers in its pool."""
    config = DecoderConfig(
        shape=shape, rms_eps=1e-5, rope=Rope(theta=500000.0), max_positions=8192, sliding_window=None,
        qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False, tied=False, eos_token_ids=(),
    )  # fmt: skip
    weights = random_weights(config, DTYPES[compute_dtype(engine)], device)
    state = allocate_state(config, weights, engine, config.max_positions, say)
    state.pool.tensor.normal_(std=0.01)
    runner = CudaRunner(state, engine)
    runner.warm_up(say)
    return runner


def measure(config: Config, runner: CudaRunner, case: EngineCase, sequences: int) -> EngineFigures:
    """Measure one batch, after a run of it that loads the adapters and warms up."""
    shape, dtype = runner.shape, config.engine.slab_dtype
    headers = {f"{i}-rank{rank}": make_uniform_layout(shape, dtype, rank) for i, rank in enumerate(case.ranks)}
    engine = RandomPoolEngine(config, headers, runner)
    names = list(headers) or [""]
    sampling = SamplingParams(max_tokens=case.output_tokens, temperature=0.0, ignore_eos=True)
    requests = [
        OfflineRequest(
            prompt=tuple((i * 997 + t) % shape.vocab for t in range(case.prompt_tokens)),
            sampling=sampling,
            adapter=names[i % len(names)],
        )
        for i in range(sequences)
    ]
    engine.generate(requests)
    outputs = engine.generate(requests)
    for index in range(len(case.ranks)):
        runner.remove(index)
    return decode_figures(outputs, [s.duration_s for s in engine.steps if s.tokens == s.sequences == sequences])


def decode_figures(outputs: Sequence[OfflineOutput], decode_steps_s: Sequence[float]) -> EngineFigures:
    """Return the figures from the time when every sequence has its first token until the first sequence ends."""
    failed = [output.error for output in outputs if output.error]
    assert not failed, failed[0]
    assert decode_steps_s, "the sequences never decoded all together: their adapters or their KV do not fit this GPU"
    begin = max(output.times_s[0] for output in outputs)
    end = min(output.times_s[-1] for output in outputs)
    tokens = sum(begin < time <= end for output in outputs for time in output.times_s)
    step_s = statistics.median(decode_steps_s)
    return EngineFigures(
        tokens_per_s=tokens / (end - begin),
        step_ms=1e3 * step_s,
        gpu_busy=min(1.0, step_s * tokens / len(outputs) / (end - begin)),
        ttft_s=statistics.mean(output.times_s[0] for output in outputs),
    )


def say(text: str) -> None:
    print(f"  {text}", flush=True)


def run_cases(
    shape: ModelShape, device: torch.device, engine: EngineConfig, sequences: int, quick: bool
) -> dict[str, Any]:
    """Return the figures of each case and ``decode_with_64_adapters``.

    That is the tokens per second with an adapter for each sequence over those without adapters.
    """
    config = Config(engine=engine)
    runner = make_runner(shape, engine, device)
    found: dict[str, EngineFigures] = {}
    print(f"{'adapters':<36}{'tokens/s':>10}{'step ms':>9}{'GPU busy':>10}{'TTFT s':>8}")
    for case in cases(sequences, quick):
        f = found[case.name] = measure(config, runner, case, sequences)
        print(f"{case.name:<36}{f.tokens_per_s:10.0f}{f.step_ms:9.2f}{f.gpu_busy:10.0%}{f.ttft_s:8.2f}", flush=True)
    none, mixed = list(found.values())[:2]
    return {
        "decode_with_64_adapters": mixed.tokens_per_s / none.tokens_per_s,
        "backend": runner.weights_backend,
        "cases": {name: msgspec.structs.asdict(f) for name, f in found.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter prompts and outputs")
    arguments = parser.parse_args()
    reason = gpu_error()
    if reason:
        print(f"not measured: {reason}")
        return 1
    engine = EngineConfig(
        max_running=SEQUENCES, max_adapters=SEQUENCES, max_rank=128, max_step_tokens=2048, prefix_cache=False,
        pool_fraction=0.5,
    )  # fmt: skip
    result = run_cases(LLAMA_3_8B, torch.device("cuda", 0), engine, SEQUENCES, arguments.quick)
    print(msgspec.json.encode(result).decode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
