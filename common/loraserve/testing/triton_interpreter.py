"""Triton's interpreter, so that GPU kernels are computed where there is no GPU.

Up to triton 3.7 it keeps bfloat16 as its bits and multiplies those in ``tl.dot``; ``repair`` widens them first.
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
    """Make products of bfloat16 tiles products of their values. Raises ImportError where triton is missing."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return original(self, a, b, d, *options)
        product = np.matmul(_widen(a.data), _widen(b.data))
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
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
