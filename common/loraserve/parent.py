"""Ends a process whose supervisor is gone, so that nothing is left behind."""

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Callable

CHECK_INTERVAL_S = 1.0
_PR_SET_PDEATHSIG = 1


class Parent:
    """The supervisor named by ``--parent-pid``; it need not be the direct parent."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._direct = os.getppid() == pid
        if self._direct:
            _ask_for_signal()

    def is_alive(self) -> bool:
        if self._direct:
            # Also right where the id was given to another process since, or the parent is a zombie.
            return os.getppid() == self._pid
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    async def watch(self, on_gone: Callable[[], None]) -> None:
        """Calls ``on_gone`` once, within CHECK_INTERVAL_S of the parent's end."""
        # The kernel tells nobody but direct children, so there is nothing to wait on but time.
        while self.is_alive():  # noqa: ASYNC110
            await asyncio.sleep(CHECK_INTERVAL_S)
        on_gone()


def _ask_for_signal() -> None:
    """Linux: SIGTERM the moment the parent dies, even while this process is busy importing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
