"""Compiles CPU kernels for the local processor and caches the machine code on disk.

A kernel takes one argument, the address of its operand block (see operands.py). All kernels therefore have one
signature. A call costs about two microseconds and never starts a compilation for a new argument type.
"""

import ctypes
import hashlib
import os
import pickle
import sys
import threading
from collections.abc import Callable
from functools import cache
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

I64 = ir.IntType(64)
C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_config: Any = numba.config
_compile_lock = threading.Lock()


class Kernel:
    """A compiled function that takes the address of an ``OperandBlock``. ``warm_up`` or the first use compiles it."""

    def __init__(self, function: Callable[[int], None]) -> None:
        self._function = function
        self._compiled: Any = None
        self._call: Any = None

    @property
    def address(self) -> int:
        """Machine address of the compiled C function, a ``void (*)(void *)``."""
        if self._call is None:
            self.warm_up()
        address: int = self._compiled.address
        return address

    @property
    def call(self) -> Any:
        """The kernel as a Python callable that takes an address. A call releases the interpreter lock."""
        if self._call is None:
            self.warm_up()
        return self._call

    def warm_up(self) -> None:
        """Compile the kernel or load it from the disk cache."""
        with _compile_lock:
            if self._call is None:
                self._compiled = _compile(self._function)
                self._call = C_FUNCTION(self._compiled.address)


def called(variant: str) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a function which kernels call.

    ``variant``, the dtype, becomes part of the function's symbol. The disk cache holds code from several processes. If
    two dtypes had the same symbol, the linker could call the code of the wrong dtype.
    """

    def compile_later(function: Callable[..., Any]) -> Any:
        function.__name__ += f"_{variant}"
        function.__qualname__ += f"_{variant}"
        return njit(nogil=True, error_model="numpy")(function)

    return compile_later


def inlined(function: Callable[..., Any]) -> Any:
    """Compile a function with numba and inline it into its callers, which saves compile time."""
    return njit(nogil=True, error_model="numpy", inline="always")(function)


def emitted(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that makes a numba intrinsic of a function which emits LLVM instructions.

    The function takes the builder and the arguments' LLVM values, and returns the result's LLVM value or None. It runs
    at compile time, once for each call in a kernel's source.
    """

    def make(emit: Callable[..., Any]) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            result = emit(builder, *arguments)
            return context.get_dummy_value() if result is None else result

        def typed(*arguments: Any) -> Any:
            return signature, codegen

        # Numba reads the number of arguments from __signature__.
        names = ("typingctx", *(f"argument_{i}" for i in range(len(signature.args))))
        typed.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_ONLY) for name in names])  # type: ignore[attr-defined]
        typed.__name__ = emit.__name__
        return intrinsic(typed)

    return make


def no_result(arguments: int) -> Any:
    """Return the signature of an intrinsic with ``arguments`` int64 parameters and no result."""
    return types.none(*([types.int64] * arguments))


def _compile(function: Callable[[int], None]) -> Any:
    # Without a usable disk cache, compile in memory: the index may be damaged, the disk full or read-only.
    try:
        return _compile_with_cache(function)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
        return cfunc(types.void(types.int64), error_model="numpy")(function)


def _compile_with_cache(function: Callable[[int], None]) -> Any:
    previous = _config.CACHE_DIR
    _config.CACHE_DIR = str(cache_dir())
    try:
        return cfunc(types.void(types.int64), cache=True, error_model="numpy")(function)
    finally:
        _config.CACHE_DIR = previous


def cache_dir() -> Path:
    """Return the cache folder of compiled kernels.

    It is under NUMBA_CACHE_DIR if set, else under the user's cache folder. Its name is a digest of all kernel sources.
    """
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    return (Path(chosen) if chosen else _user_cache()) / "loraserve-kernels" / _source_digest()


def _user_cache() -> Path:
    if sys.platform == "darwin":
        return Path("~/Library/Caches").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


@cache
def _source_digest() -> str:
    # Numba checks only whether the kernel's own file has changed. The digest also covers the files that it imports.
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
