"""The engine benchmark with a model that is small enough for the interpreter."""

import pytest
import torch

from loraserve.config import EngineConfig
from loraserve.model_shape import ModelShape
from loraserve.testing.engine.offline import OfflineOutput

pytest.importorskip("triton", reason="the CUDA runner needs triton")

from loraserve.benchmarks import engine as bench

TINY = ModelShape(layers=1, hidden=32, heads=2, kv_heads=1, head_dim=16, ffn=48, vocab=64)


def test_all_cases_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "RANKS", (4, 8))
    engine = EngineConfig(
        slab_dtype="float32", max_running=2, max_adapters=2, max_rank=8, max_step_tokens=32, kv_bytes=1 << 20,
        pool_bytes=1 << 20,
    )  # fmt: skip
    monkeypatch.setattr(
        bench,
        "cases",
        lambda sequences, quick: [
            bench.EngineCase(name="none", ranks=(), prompt_tokens=8, output_tokens=4),
            bench.EngineCase(name="two", ranks=(4, 8), prompt_tokens=8, output_tokens=4),
        ],
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = bench.run_cases(TINY, device, engine, sequences=2, quick=True)
    assert set(result["cases"]) == {"none", "two"}
    assert result["decode_with_64_adapters"] > 0


def test_tokens_are_counted_while_every_sequence_decodes() -> None:
    outputs = [
        OfflineOutput(tokens=[1, 2, 3, 4], times_s=[1.0, 2.0, 3.0, 4.0]),
        OfflineOutput(tokens=[1, 2, 3], times_s=[1.5, 2.0, 3.5]),
    ]
    found = bench.decode_figures(outputs, [0.5, 0.7, 0.5])
    # From 1.5, when both have a token, to 3.5, when the first ends: two of each.
    assert found.tokens_per_s == pytest.approx(4 / 2.0)
    assert found.step_ms == 500
    assert found.gpu_busy == pytest.approx(0.5 * 4 / 2 / 2.0)
    assert found.ttft_s == 1.25
