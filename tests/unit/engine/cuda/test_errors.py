"""Which CUDA errors make the device unusable."""

import pytest
import torch

from loraserve.engine.compute.protocol import DeviceLostError
from loraserve.engine.cuda.memory import device_errors


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported late",
        "CUDA error: device-side assert triggered",
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "Triton Error [CUDA]: unspecified launch failure",
    ],
)
def test_a_fatal_error_is_reported_as_a_lost_device(text: str) -> None:
    with pytest.raises(DeviceLostError) as lost, device_errors():
        raise RuntimeError(text)
    assert str(lost.value) == text.splitlines()[0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),  # page-locked memory of the host
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("shape mismatch"),
        ValueError("token id 7 is outside the vocabulary of 5"),
    ],
)
def test_other_errors_are_passed_on(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, device_errors():
        raise error
    assert raised.value is error
