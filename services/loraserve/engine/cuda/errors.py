"""Recognises the CUDA errors after which this process cannot use its GPU any more."""

from collections.abc import Iterator
from contextlib import contextmanager

from loraserve.engine.compute.protocol import DeviceLostError

FATAL_PREFIXES = ("CUDA error", "Triton Error [CUDA]")
"""Prefixes of the driver's errors in torch and Triton. The next driver call reports a crashed kernel."""


@contextmanager
def device_errors() -> Iterator[None]:
    """Raise DeviceLostError for CUDA errors that make the device unusable. Out of memory is not such an error."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if any(prefix in text for prefix in FATAL_PREFIXES) and "out of memory" not in text:
            raise DeviceLostError(text.splitlines()[0]) from error
        raise
