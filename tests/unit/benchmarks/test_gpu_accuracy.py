"""The accuracy check that runs at full size on a GPU, here with small shapes; it finds wrong kernels."""

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton")

from loraserve.benchmarks import gpu_accuracy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCHES = {"decode": [0, -1, 1, 5], "prefill": [3] * 260 + [-1]}


def test_small_shapes_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_accuracy, "batches", lambda small: BATCHES)
    results = gpu_accuracy.check_all(gpu_accuracy.SMALL, DEVICE, True, ["bfloat16"])
    assert len(results) == 4 * len(BATCHES)
    assert all(result.good for result in results), results


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_accuracy.add_lora
    setup = gpu_accuracy.AccuracySetup(gpu_accuracy.SMALL, "float16", DEVICE)

    def touches_others(y: torch.Tensor, *rest: object) -> None:
        right(y, *rest)  # type: ignore[arg-type]
        y[1, 0] = 0.0

    def loses_a_block(y: torch.Tensor, *rest: object) -> None:
        right(y, *rest)  # type: ignore[arg-type]
        y[0, -64:] = 0.0

    def reads_poison(y: torch.Tensor, *rest: object) -> None:
        right(y, *rest)  # type: ignore[arg-type]
        y[0, 3] = float("nan")

    for wrong in (touches_others, loses_a_block, reads_poison):
        monkeypatch.setattr(gpu_accuracy, "add_lora", wrong)
        assert not setup.check(1, BATCHES["decode"], "decode").good, wrong.__name__
