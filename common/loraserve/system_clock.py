"""The operating system's clock. Apart from clock.py, so that pure modules may name the Protocol alone."""

import time


class SystemClock:
    def monotonic_s(self) -> float:
        return time.monotonic()

    def unix_s(self) -> float:
        return time.time()
