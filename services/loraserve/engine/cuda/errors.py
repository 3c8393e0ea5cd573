"""Which errors of a GPU end one step, and which end the process."""

from collections.abc import Iterator
from contextlib import contextmanager

from loraserve.engine.runner_protocol import DeviceLost

LOST = ("CUDA error", "Triton Error [CUDA]")
"""How torch and Triton begin what the driver told them: whichever calls it next hears of a kernel that crashed."""


@contextmanager
def device_errors() -> Iterator[None]:
    """Turns what CUDA reports once and for ever into DeviceLost, whoever notices; running out of memory stays."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if any(sign in text for sign in LOST) and "out of memory" not in text:
            raise DeviceLost(text.splitlines()[0]) from error
        raise
