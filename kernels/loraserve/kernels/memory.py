"""Raw memory as kernels see it: addresses become arrays, and threads share out the parts of a call."""

import struct
from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from loraserve.kernels.compiled import inlined

I64 = ir.IntType(64)


def _pointer_to(element: Any) -> Any:
    """Intrinsic pointer(address): an int64 address as a pointer to elements of this type."""

    def pointer(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        make_pointer: Any = types.CPointer
        return make_pointer(element)(types.int64), codegen

    return intrinsic(pointer)


_to_i64, _to_i32, _to_f32 = (_pointer_to(element) for element in (types.int64, types.int32, types.float32))


@inlined
def int64s(address, count):  # type: ignore[no-untyped-def]
    """``count`` int64 values at an address."""
    return carray(_to_i64(address), (count,), np.int64)


@inlined
def int32s(address, count):  # type: ignore[no-untyped-def]
    """``count`` int32 values at an address."""
    return carray(_to_i32(address), (count,), np.int32)


@inlined
def floats(address, count):  # type: ignore[no-untyped-def]
    """``count`` float32 values at an address."""
    return carray(_to_f32(address), (count,), np.float32)


def _take_part(typingctx: Any, operands: Any) -> Any:
    """The number of the next part of a call that no thread has taken yet: counts up operand 0."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(I64, 1), "acq_rel")

    return types.int64(types.int64), codegen


take_part: Any = intrinsic(_take_part)


def _as_float(typingctx: Any, bits: Any) -> Any:
    """The float32 whose bits are an integer's low half: how kernels take fractions among their operands."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.trunc(arguments[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), codegen


as_float: Any = intrinsic(_as_float)


@lru_cache(maxsize=256)
def float_bits(value: float) -> int:
    """The operand from which ``as_float`` makes this value."""
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits
