"""Triton's interpreter, so that GPU kernels are computed where there is no GPU.

Up to triton 3.7 it keeps bfloat16 as its bits, multiplies those in ``tl.dot`` and cuts off what a number has beyond
them; ``repair`` makes both as on a GPU, which multiplies the values and rounds to the nearest.
"""

import os
from typing import Any

import numpy as np


def use_interpreter() -> None:
    """Call it before the first kernel is imported: kernels are interpreted from then on, in this process alone."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        repair()
    except ImportError:  # no triton: tests that need it say so
        os.environ.pop("TRITON_INTERPRET")


def repair() -> None:
    """Make bfloat16 what it is on a GPU. Raises ImportError where triton is missing."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return dot(self, a, b, d, *options)
        product = np.matmul(_widen(a.data), _widen(b.data))
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        kinds = source.dtype.scalar, to.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_round(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_widen(source.data), tl.float32)
        return cast(self, source, to)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    interpreter.InterpretedFunction.__call__ = _call_once_patched(interpreter)


def _call_once_patched(interpreter: Any) -> Any:
    """Functions called by a kernel find the language as the kernel's launch patched it, not patched anew each time.

    Functions of triton's own library look at another module, which keeps its patches.
    """
    patched: set[bool] = set()

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        library = "tl" not in self.fn.__globals__
        if library not in patched:
            patched.add(library)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **options)

    return call


def _widen(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(values: Any) -> Any:
    """The nearest bfloat16, the even one of two, as its bits; a NaN stays one."""
    bits = values.astype(np.float32).view(np.uint32)
    nearest = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)
