"""Runs a kernel on several threads, up to ``torch.get_num_threads()``.

A kernel call consists of numbered, independent parts. Each thread takes the next free part with ``take_part`` until
none is left. The calling thread computes parts too. It never waits for a helper that has not started. If other
processes keep all helpers off the cores, the call takes only as long as on one thread.

The threads synchronise in compiled code with POSIX mutexes and condition variables, so helpers do not need the
interpreter lock. The calls of a step follow each other closely, and waking a helper takes longer than many calls. A
helper therefore spins briefly before it sleeps.
"""

import ctypes
import platform
import threading
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from loraserve.kernels.cpu.compiled import I64, Kernel, emitted, no_result
from loraserve.kernels.cpu.operands import OperandBlock, integers, reader

LEADER_SPINS = 4000
"""How often the calling thread checks for running helpers before it sleeps. They usually finish in microseconds."""
HELPER_SPINS = 3000
"""How often a helper checks for the next call before it sleeps. This takes about 100 us, more than calls are apart."""
ON_X86 = platform.machine() in ("x86_64", "AMD64")


class TeamState(ctypes.Structure):
    """Memory that the calling thread and its helpers share. Each mutex and condition variable has 128 bytes."""

    _fields_ = (
        ("mutex", ctypes.c_char * 128),
        ("work_available", ctypes.c_char * 128),
        ("helpers_finished", ctypes.c_char * 128),
        # The current kernel and its operands. Numbers of helpers that may still join, are computing, or are asleep.
        *integers("kernel", "operands", "places", "inside", "asleep"),
    )


class LeadCall(OperandBlock):
    """Operands of ``_lead_call``: addresses of ``TeamState``, kernel and its operands, and the number of helpers."""

    __slots__ = ()
    _fields_ = integers("state", "kernel", "operands", "helpers")


_state, _lead_operands = reader(TeamState), reader(LeadCall)
WORK_AVAILABLE, HELPERS_FINISHED = TeamState.work_available.offset, TeamState.helpers_finished.offset
PLACES, INSIDE = TeamState.places.offset, TeamState.inside.offset


def _c_function(name: str, count: int) -> Any:
    """Return an intrinsic that calls a C function with ``count`` int64 arguments and ignores its result."""

    @emitted(no_result(count))
    def call(builder: Any, *arguments: Any) -> None:
        kind = ir.FunctionType(ir.IntType(32), [I64] * count)
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)

    return call


_lock, _unlock = _c_function("pthread_mutex_lock", 1), _c_function("pthread_mutex_unlock", 1)
_wait, _signal = _c_function("pthread_cond_wait", 2), _c_function("pthread_cond_signal", 1)


@emitted(no_result(2))
def _call_kernel(builder: Any, kernel: Any, operands: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [I64])
    builder.call(builder.inttoptr(kernel, kind.as_pointer()), [operands])


@emitted(types.int64(types.int64))
def _load_acquire(builder: Any, address: Any) -> Any:
    return builder.load_atomic(builder.inttoptr(address, I64.as_pointer()), "acquire", 8)


@emitted(no_result(0))
def _pause(builder: Any) -> None:
    """Emit a spin-wait hint on x86, which lets the core's other hardware thread run."""
    if ON_X86:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])


def _lead_call(operands):  # type: ignore[no-untyped-def]
    """Run a kernel together with the helpers and return when all parts are done."""
    call = _lead_operands(operands)
    state = call.state
    shared = _state(state)
    _lock(state)
    shared.kernel = call.kernel
    shared.operands = call.operands
    shared.places = call.helpers
    sleepers = min(call.helpers, shared.asleep)
    _unlock(state)
    for _ in range(sleepers):
        _signal(state + WORK_AVAILABLE)
    _call_kernel(call.kernel, call.operands)
    # All parts are taken. Helpers that have not started are not needed.
    _lock(state)
    shared.places = 0
    _unlock(state)
    spins = 0
    while spins < LEADER_SPINS and _load_acquire(state + INSIDE) > 0:
        spins += 1
    _lock(state)
    while shared.inside > 0:
        _wait(state + HELPERS_FINISHED, state)
    _unlock(state)


def _help_forever(state):  # type: ignore[no-untyped-def]
    """Run a helper thread: join one kernel call after another until the process exits."""
    shared = _state(state)
    _lock(state)
    while shared.inside >= 0:
        _unlock(state)
        spins = 0
        while spins < HELPER_SPINS and _load_acquire(state + PLACES) == 0:
            _pause()
            spins += 1
        _lock(state)
        while shared.places == 0:
            shared.asleep += 1
            _wait(state + WORK_AVAILABLE, state)
            shared.asleep -= 1
        shared.places -= 1
        shared.inside += 1
        kernel, operands = shared.kernel, shared.operands
        _unlock(state)
        _call_kernel(kernel, operands)
        _lock(state)
        shared.inside -= 1
        if shared.inside == 0:
            _signal(state + HELPERS_FINISHED)


LEAD, HELP = Kernel(_lead_call), Kernel(_help_forever)


class Team:
    """Helper threads, which work on one kernel call at a time. A concurrent caller runs its call without helpers."""

    def __init__(self) -> None:
        self._state = TeamState()
        self._address = ctypes.addressof(self._state)
        self._helpers = 0
        self._busy = threading.Lock()
        library = ctypes.CDLL(None)
        for initialise, offset in (
            (library.pthread_mutex_init, 0),
            (library.pthread_cond_init, WORK_AVAILABLE),
            (library.pthread_cond_init, HELPERS_FINISHED),
        ):
            if initialise(ctypes.c_void_p(self._address + offset), None) != 0:
                raise OSError("pthread_mutex_init or pthread_cond_init failed")

    def run(self, kernel: Kernel, operands: OperandBlock, threads: int) -> None:
        """Run all parts of a call on up to ``threads`` threads, including the calling thread."""
        if threads < 2 or not self._busy.acquire(blocking=False):
            kernel.call(ctypes.byref(operands))
            return
        try:
            while self._helpers < threads - 1:
                threading.Thread(target=HELP.call, args=(self._address,), name="kernel", daemon=True).start()
                self._helpers += 1
            call = LeadCall(
                state=self._address, kernel=kernel.address, operands=ctypes.addressof(operands), helpers=threads - 1
            )
            LEAD.call(ctypes.byref(call))
        finally:
            self._busy.release()


_team = Team()


def warm_up() -> None:
    """Compile the functions that synchronise the threads, or load them from the disk cache."""
    LEAD.warm_up()
    HELP.warm_up()


def run(kernel: Kernel, operands: OperandBlock, *, shared: bool) -> None:
    """Call a kernel. Use several threads if ``shared`` is true."""
    _team.run(kernel, operands, torch.get_num_threads() if shared else 1)
