"""Runs GPU kernels in Triton's interpreter on machines without a GPU.

Up to triton 3.7 the interpreter stores bfloat16 as bits, multiplies those bits in ``tl.dot``, and truncates when it
converts to bfloat16. ``repair`` makes it multiply the values and round to the nearest, as a GPU does.
"""

import os
from typing import Any

import numpy as np


def use_interpreter() -> None:
    """Interpret all kernels of this process. Call it before the first kernel is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        repair()
    except ImportError:  # tests that need triton are skipped
        os.environ.pop("TRITON_INTERPRET")


def repair() -> None:
    """Make bfloat16 behave as on a GPU. Raises ImportError if triton is missing."""
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
    """Return a call method that patches the language once per launch and not at every call of a device function.

    Functions of triton's own library use another module, which keeps its patches.
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
    """Return the bits of the nearest bfloat16, ties to even; a NaN stays a NaN."""
    bits = values.astype(np.float32).view(np.uint32)
    nearest = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)
