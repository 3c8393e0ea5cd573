"""Protects imports of C++ extensions from Ctrl-C.

Python raises KeyboardInterrupt in the next Python code that runs. While torch is imported, C++ often calls Python code.
KeyboardInterrupt in that Python code crashes the process, looks like a failed import, or is lost.
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

    Only Python's default handler is replaced, because other handlers do not raise KeyboardInterrupt. The block has no
    effect outside the main thread, because Python runs signal handlers only in the main thread.
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
