"""Which errors of a GPU end one step, and which end the process."""

from collections.abc import Iterator
from contextlib import contextmanager

from loraserve.engine.runner_protocol import DeviceLost


@contextmanager
def device_errors() -> Iterator[None]:
    """Turns what CUDA reports once and for ever into DeviceLost; running out of memory, or of luck, stays as it is."""
    try:
        yield
    except RuntimeError as error:
        if "CUDA error" in str(error):
            raise DeviceLost(str(error).splitlines()[0]) from error
        raise
