"""Ctrl-C in the middle of an import.

Python raises KeyboardInterrupt wherever it next runs a line of its own. Where C++ called that line, as torch does in
hundreds of places while it is imported, the exception ends the process by abort() or a segmentation fault, is taken for
a failed import, or is lost.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def hold_back_interrupts() -> Iterator[None]:
    """Around imports of C++: KeyboardInterrupt is raised after them rather than within.

    A signal that ends the process without asking Python, or that an event loop takes note of, does no harm and is left
    as it is. So are threads beside the main one, which never hear of any.
    """
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)

    here = threading.current_thread() is threading.main_thread()
    raising = [number for number in INTERRUPTS if here and signal.getsignal(number) is signal.default_int_handler]
    try:
        for number in raising:
            signal.signal(number, note)
        yield
    finally:
        for number in raising:
            # What is imported may have set a handler of its own.
            if signal.getsignal(number) is note:
                signal.signal(number, signal.default_int_handler)
        if came:
            raise KeyboardInterrupt
