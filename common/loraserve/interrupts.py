"""Protects imports of C++ extensions from Ctrl-C.

Python raises KeyboardInterrupt wherever it next runs Python code. If that code was called by C++, as happens hundreds
of times while torch is imported, the exception aborts or crashes the process, is taken for a failed import, or is lost.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def hold_back_interrupts() -> Iterator[None]:
    """Delay KeyboardInterrupt until the end of the block.

    Handlers other than Python's default one do no harm and are left in place. Threads other than the main one never
    receive signals, so there this does nothing.
    """
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    in_main = threading.current_thread() is threading.main_thread()
    raising = [number for number in INTERRUPTS if in_main and signal.getsignal(number) is signal.default_int_handler]
    try:
        for number in raising:
            signal.signal(number, note)
        yield
    finally:
        for number in raising:
            # An imported module may have set its own handler.
            if signal.getsignal(number) is note:
                signal.signal(number, signal.default_int_handler)
        if received:
            raise KeyboardInterrupt
