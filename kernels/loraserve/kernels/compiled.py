"""Kernels compiled for the processor at hand at their first use, and kept on disk for the next process.

A kernel takes one argument, the address of its int64 operands, so that a call costs two microseconds whatever the
operands are, and no type that nobody thought of can set off a compilation in the middle of a step.
"""

import ctypes
import hashlib
import os
import pickle
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba import cfunc, njit, types

FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_config: Any = numba.config
_compiling = threading.Lock()


class Kernel:
    """A compiled function of the address of its operands. Compiles at its first use; ``warm_up`` does so ahead."""

    def __init__(self, function: Callable[[int], None]) -> None:
        self._function = function
        self._compiled: Any = None
        self._call: Any = None

    @property
    def address(self) -> int:
        """Machine address of the C function ``void (*)(int64_t *)``."""
        if self._call is None:
            self.warm_up()
        address: int = self._compiled.address
        return address

    @property
    def call(self) -> Any:
        """The kernel as a Python function of a ctypes array; the interpreter's lock is released meanwhile."""
        if self._call is None:
            self.warm_up()
        return self._call

    def warm_up(self) -> None:
        """Compile, or load from the cache."""
        with _compiling:
            if self._call is None:
                self._compiled = _compile(self._function)
                self._call = FUNCTION(self._compiled.address)


def called(variant: str) -> Callable[[Callable[..., Any]], Any]:
    """A function that kernels call, kept on disk as part of them. Compiled once for itself and once in each caller.

    ``variant`` becomes part of its symbol: kernels that different processes compiled meet in one, and of two symbols of
    one name the linker takes the first, be it for another dtype.
    """

    def compile_later(function: Callable[..., Any]) -> Any:
        function.__name__ += f"_{variant}"
        function.__qualname__ += f"_{variant}"
        return njit(nogil=True, error_model="numpy")(function)

    return compile_later


def inlined(function: Callable[..., Any]) -> Any:
    """A function whose text becomes its callers': for what is short, as every level of calls costs compile time."""
    return njit(nogil=True, error_model="numpy", inline="always")(function)


def _compile(function: Callable[[int], None]) -> Any:
    # An index of an interrupted copy, a full disk, a home that nobody may write: all cost time, none the result.
    try:
        return _with_cache(function)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
        return cfunc(types.void(types.int64), error_model="numpy")(function)


def _with_cache(function: Callable[[int], None]) -> Any:
    before = _config.CACHE_DIR
    _config.CACHE_DIR = str(cache_dir())
    try:
        return cfunc(types.void(types.int64), cache=True, error_model="numpy")(function)
    finally:
        _config.CACHE_DIR = before


def cache_dir() -> Path:
    """Where compiled kernels are kept: NUMBA_CACHE_DIR or the user's cache folder, by the kernels' source."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    return (Path(chosen) if chosen else _user_cache()) / "loraserve-kernels" / _source_digest()


def _user_cache() -> Path:
    if sys.platform == "darwin":
        return Path("~/Library/Caches").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


@cache
def _source_digest() -> str:
    # Numba looks at a kernel's own file alone and would go on running code built from another file's old text.
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
