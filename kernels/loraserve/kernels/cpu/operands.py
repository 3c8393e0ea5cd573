"""Operand blocks: C structs in which Python passes the operands of a call to a compiled CPU kernel.

Each kernel declares its operands once, as a subclass of ``OperandBlock``. The caller sets the fields by keyword. The
compiled kernel reads them through ``reader(Block)``, which uses the same declaration. Tensors are passed as addresses.
In a kernel ``floats``, ``int32s`` and ``int64s`` turn an address into an array.
"""

import ctypes
from typing import Any, ClassVar

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.numpy_support import carray, from_dtype

from loraserve.kernels.cpu.compiled import I64, emitted, inlined

Fields = tuple[tuple[str, type[Any]], ...]


def integers(*names: str) -> Fields:
    """Return the declarations of int64 fields, for counts, strides in elements and addresses."""
    return tuple((name, ctypes.c_int64) for name in names)


def fractions(*names: str) -> Fields:
    """Return the declarations of float32 fields."""
    return tuple((name, ctypes.c_float) for name in names)


class OperandBlock(ctypes.Structure):
    """Base of all operand blocks. A subclass lists its operands in ``_fields_``.

    Subclasses set ``__slots__ = ()``, so that a misspelt operand raises AttributeError. ``next_part`` is the number of
    the part that the next free thread computes (see threads.py).
    """

    __slots__ = ()
    _fields_: ClassVar[Fields] = integers("next_part")


def reader(block: type[ctypes.Structure]) -> Any:
    """Return a compiled function that takes an address and returns the ``block`` record stored there."""
    dtype = record_dtype(block)
    pointer = _pointer_to(from_dtype(dtype))

    @inlined
    def read(address):  # type: ignore[no-untyped-def]
        return carray(pointer(address), (1,), dtype)[0]

    return read


def record_dtype(block: type[ctypes.Structure]) -> np.dtype[Any]:
    """Return the numpy dtype of a C struct. It has all numeric fields, including inherited ones."""
    declared = [field for base in reversed(block.__mro__) for field in base.__dict__.get("_fields_", ())]
    fields = [(name, kind) for name, kind in declared if issubclass(kind, ctypes._SimpleCData)]
    return np.dtype(
        {
            "names": [name for name, _ in fields],
            "formats": [np.dtype(kind) for _, kind in fields],
            "offsets": [getattr(block, name).offset for name, _ in fields],
            "itemsize": ctypes.sizeof(block),
        }
    )


def assert_dense(tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Assert that a tensor is contiguous float32 of this shape, because kernels index its raw memory."""
    assert tensor.dtype == torch.float32, tensor.dtype
    assert tensor.is_contiguous(), tensor.stride()
    assert tensor.shape == shape, (tensor.shape, shape)


def _pointer_to(element: Any) -> Any:
    """Return the intrinsic pointer(address), which converts an int64 address to a pointer to ``element``."""
    make_pointer: Any = types.CPointer

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    def pointer(typingctx: Any, address: Any) -> Any:
        return make_pointer(element)(types.int64), codegen

    return intrinsic(pointer)


_to_i64, _to_i32, _to_f32 = (_pointer_to(element) for element in (types.int64, types.int32, types.float32))


@inlined
def int64s(address, count):  # type: ignore[no-untyped-def]
    """Return the ``count`` int64 values at an address as an array."""
    return carray(_to_i64(address), (count,), np.int64)


@inlined
def int32s(address, count):  # type: ignore[no-untyped-def]
    """Return the ``count`` int32 values at an address as an array."""
    return carray(_to_i32(address), (count,), np.int32)


@inlined
def floats(address, count):  # type: ignore[no-untyped-def]
    """Return the ``count`` float32 values at an address as an array."""
    return carray(_to_f32(address), (count,), np.float32)


assert OperandBlock.next_part.offset == 0, "take_part counts up the first field"


@emitted(types.int64(types.int64))
def take_part(builder: Any, operands: Any) -> Any:
    """Emit an atomic increment of ``OperandBlock.next_part``. The old value is the part that the thread computes."""
    next_part = builder.inttoptr(operands, I64.as_pointer())
    return builder.atomic_rmw("add", next_part, ir.Constant(I64, 1), "acq_rel")
