"""The compiled part of workers.py: one thread leads a call, helpers that wake in time take parts of it.

Shared memory: a mutex, two conditions (work to join, helpers done), then the fields of the call in progress. It is all
POSIX threads, so that a helper needs neither the interpreter's lock to begin nor, between steps, a processor. Within a
step calls follow each other closely: a helper looks out for the next one for a moment before it sleeps, because to wake
it costs more than many a call takes.
"""

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from loraserve.kernels.compiled import Kernel
from loraserve.kernels.memory import I64, int64s

WORK, DONE, FIELDS = 128, 256, 384
"""Byte offsets; the mutex is at 0. No platform's mutex or condition takes more than 64 bytes."""
FUNCTION, OPERANDS, OPEN, INSIDE, ASLEEP, FIELD_COUNT = range(6)
"""The call, helpers that may still join it, helpers that are in it, helpers that have to be woken."""
STATE_BYTES = FIELDS + 8 * FIELD_COUNT
SPINS = 4000
"""Looks at the helpers before sleeping: they finish within microseconds unless they lost their processor."""
LOOKOUT = 3000
"""Looks for the next call before a helper sleeps: some 100 us, longer than Python takes from one call to the next."""
ON_X86 = platform.machine() in ("x86_64", "AMD64")


def _c_function(name: str, count: int) -> Any:
    """Intrinsic for a C function of ``count`` integers or addresses, called for its effect."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [I64] * count)
        function = cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
        builder.call(function, arguments)
        return context.get_dummy_value()

    def one(typingctx: Any, a: Any) -> Any:
        return types.none(types.int64), emit

    def two(typingctx: Any, a: Any, b: Any) -> Any:
        return types.none(types.int64, types.int64), emit

    return intrinsic(one if count == 1 else two)


_lock, _unlock = _c_function("pthread_mutex_lock", 1), _c_function("pthread_mutex_unlock", 1)
_wait, _signal = _c_function("pthread_cond_wait", 2), _c_function("pthread_cond_signal", 1)


def _invoke_at(typingctx: Any, function: Any, operands: Any) -> Any:
    """Call the kernel at an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), codegen


def _read_at(typingctx: Any, address: Any) -> Any:
    """The int64 at an address that other threads write."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(types.int64), codegen


def _pause_briefly(typingctx: Any) -> Any:
    """Leave the core to its other thread for a moment."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if ON_X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            pause = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause")  # type: ignore[no-untyped-call]
            builder.call(pause, [])
        return context.get_dummy_value()

    return types.none(), codegen


_pause: Any = intrinsic(_pause_briefly)
_invoke: Any = intrinsic(_invoke_at)
_read: Any = intrinsic(_read_at)


def _lead_call(operands):  # type: ignore[no-untyped-def]
    """Run a call and return when it is done; operands: -, shared memory, kernel, its operands, helpers wanted."""
    values = int64s(operands, 5)
    state, function, call, helpers = values[1], values[2], values[3], values[4]
    fields = int64s(state + FIELDS, FIELD_COUNT)
    _lock(state)
    fields[FUNCTION] = function
    fields[OPERANDS] = call
    fields[OPEN] = helpers
    asleep = min(helpers, fields[ASLEEP])
    _unlock(state)
    for _ in range(asleep):
        _signal(state + WORK)
    _invoke(function, call)
    # Whoever has not begun by now would find nothing left to do: do not wait for him.
    _lock(state)
    fields[OPEN] = 0
    _unlock(state)
    spins = 0
    while spins < SPINS and _read(state + FIELDS + 8 * INSIDE) > 0:
        spins += 1
    _lock(state)
    while fields[INSIDE] > 0:
        _wait(state + DONE, state)
    _unlock(state)


def _help_forever(state):  # type: ignore[no-untyped-def]
    """Join calls as they come; ends with the process."""
    fields = int64s(state + FIELDS, FIELD_COUNT)
    _lock(state)
    while fields[INSIDE] >= 0:
        _unlock(state)
        looks = 0
        while looks < LOOKOUT and _read(state + FIELDS + 8 * OPEN) == 0:
            _pause()
            looks += 1
        _lock(state)
        while fields[OPEN] == 0:
            fields[ASLEEP] += 1
            _wait(state + WORK, state)
            fields[ASLEEP] -= 1
        fields[OPEN] -= 1
        fields[INSIDE] += 1
        function, call = fields[FUNCTION], fields[OPERANDS]
        _unlock(state)
        _invoke(function, call)
        _lock(state)
        fields[INSIDE] -= 1
        if fields[INSIDE] == 0:
            _signal(state + DONE)


LEAD, HELP = Kernel(_lead_call), Kernel(_help_forever)
