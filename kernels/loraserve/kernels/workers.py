"""Runs a kernel on up to as many threads as torch was told to use.

A call is cut into numbered parts that do not depend on each other; every thread takes the next one that nobody has
taken (``memory.take_part``) until none is left. The caller works too and never waits for a helper that has not begun:
where other processes hold the cores, a call takes as long as it takes alone and no longer.
"""

import ctypes
import threading

import torch

from loraserve.kernels.compiled import Kernel
from loraserve.kernels.team_kernels import DONE, HELP, LEAD, STATE_BYTES, WORK


class Team:
    """Threads that sleep between calls. One call at a time: a second caller works alone."""

    def __init__(self) -> None:
        self._state = ctypes.create_string_buffer(STATE_BYTES)
        self._address = ctypes.addressof(self._state)
        self._helpers = 0
        self._busy = threading.Lock()
        library = ctypes.CDLL(None)
        for initialise, offset in (
            (library.pthread_mutex_init, 0),
            (library.pthread_cond_init, WORK),
            (library.pthread_cond_init, DONE),
        ):
            if initialise(ctypes.c_void_p(self._address + offset), None) != 0:
                raise OSError("POSIX threads: no mutex or condition to be had")

    def run(self, kernel: Kernel, call: "ctypes.Array[ctypes.c_int64]", threads: int) -> None:
        """Returns when all parts are done."""
        if threads < 2 or not self._busy.acquire(blocking=False):
            kernel.call(call)
            return
        try:
            while self._helpers < threads - 1:
                threading.Thread(target=HELP.call, args=(self._address,), name="kernel", daemon=True).start()
                self._helpers += 1
            LEAD.call((ctypes.c_int64 * 5)(0, self._address, kernel.address, ctypes.addressof(call), threads - 1))
        finally:
            self._busy.release()


_team = Team()


def warm_up() -> None:
    """Compile, or load from the cache, what shares a call among threads."""
    LEAD.warm_up()
    HELP.warm_up()


def run(kernel: Kernel, shared: bool, *operands: int) -> None:
    """Call a kernel with its operands 1, 2, ...; operand 0 counts the parts taken.

    ``shared``: the work is worth more than one thread.
    """
    call = (ctypes.c_int64 * (len(operands) + 1))(0, *operands)
    _team.run(kernel, call, torch.get_num_threads() if shared else 1)
