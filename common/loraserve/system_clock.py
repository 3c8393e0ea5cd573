"""The machine's clock."""

import time


class SystemClock:
    """See Clock."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def unix_s(self) -> float:
        return time.time()
