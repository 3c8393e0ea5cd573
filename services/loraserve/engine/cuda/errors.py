"""Recognises the CUDA errors after which a GPU computes nothing any more."""

from collections.abc import Iterator
from contextlib import contextmanager

from loraserve.engine.compute.protocol import DeviceLostError

FATAL_PREFIXES = ("CUDA error", "Triton Error [CUDA]")
"""How torch and Triton report the driver's errors. A crashed kernel is reported by whatever calls the driver next."""


@contextmanager
def device_errors() -> Iterator[None]:
    """Turn CUDA errors that make the device unusable into DeviceLostError. Running out of memory is not one."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if any(prefix in text for prefix in FATAL_PREFIXES) and "out of memory" not in text:
            raise DeviceLostError(text.splitlines()[0]) from error
        raise
