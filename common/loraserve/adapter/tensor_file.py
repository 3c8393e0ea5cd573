"""Reads an untrusted safetensors file tensor by tensor.

The module uses ``preadv`` instead of a memory mapping. If the file is truncated during a read, ``preadv`` returns fewer
bytes, while access to a mapping would end the process with SIGBUS.
"""

import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated

import msgspec
import numpy as np

from loraserve.adapter.dtypes import Elements, storage_dtype
from loraserve.adapter.format import ITEM_BYTES, Dtype
from loraserve.errors import AdapterError

MAX_HEADER_BYTES = 16 << 20
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_DTYPES: dict[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_Size = Annotated[int, msgspec.Meta(ge=0)]


class TensorEntry(msgspec.Struct, frozen=True):
    """A tensor in a file. ``begin`` is the offset of its first byte from the start of the file."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class _Declared(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]


class TensorFile:
    """An open safetensors file. ``entries`` maps tensor names to the entries of its header.

    The constructor and ``read`` raise AdapterError ``bad_format`` if the file is truncated or not a safetensors file.
    The constructor raises ``not_found``, or ``unsupported`` if a dtype is not float32, float16 or bfloat16.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = open_regular(path)
        try:
            self.entries: Mapping[str, TensorEntry] = self._read_header()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def read(self, entry: TensorEntry) -> Elements:
        values = np.empty(entry.shape, dtype=storage_dtype(entry.dtype))
        self._fill(values.reshape(-1).view(np.uint8).data, entry.begin, entry.name)
        return values

    def _read_header(self) -> dict[str, TensorEntry]:
        file_bytes = os.fstat(self._fd).st_size
        prefix = bytearray(_LENGTH_BYTES)
        self._fill(memoryview(prefix), 0, "the header's length")
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER_BYTES, file_bytes - _LENGTH_BYTES):
            raise self._broken(f"its header claims {length} bytes of a file of {file_bytes}")
        text = bytearray(length)
        self._fill(memoryview(text), _LENGTH_BYTES, "the header")
        declared = self._decode(bytes(text))
        return self._place(declared, _LENGTH_BYTES + length, file_bytes)

    def _decode(self, text: bytes) -> dict[str, _Declared]:
        try:
            raw = msgspec.json.decode(text.decode(), type=dict[str, msgspec.Raw])
            msgspec.json.decode(raw.pop(_METADATA, b"{}"), type=dict[str, str])
            return {name: msgspec.json.decode(value, type=_Declared) for name, value in raw.items()}
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise self._broken(f"its header is not a table of tensors ({error})") from error

    def _place(self, declared: Mapping[str, _Declared], data_begin: int, file_bytes: int) -> dict[str, TensorEntry]:
        """Return the entries in file order. Refuse gaps and overlaps between tensors, and trailing bytes."""
        entries = {}
        position = 0
        for name, tensor in sorted(declared.items(), key=lambda item: item[1].data_offsets):
            dtype = _DTYPES.get(tensor.dtype)
            if dtype is None:
                raise AdapterError(
                    "unsupported",
                    f"{self._path.name}: tensor {name} has dtype {tensor.dtype}; save the adapter as float32, float16 "
                    "or bfloat16",
                )
            entry = TensorEntry(name, dtype, tensor.shape, data_begin + position)
            if tensor.data_offsets != (position, position + entry.size_bytes):
                raise self._broken(f"the offsets of tensor {name} do not match its shape and the tensors before it")
            position += entry.size_bytes
            entries[name] = entry
        if data_begin + position != file_bytes:
            raise self._broken(f"it holds {file_bytes} bytes where its header declares {data_begin + position}")
        return entries

    def _fill(self, into: memoryview, offset: int, what: str) -> None:
        done = 0
        while done < len(into):
            count = os.preadv(self._fd, [into[done:]], offset + done)
            if count == 0:
                raise self._broken(f"it ends inside {what}")
            done += count

    def _broken(self, reason: str) -> AdapterError:
        return AdapterError(
            "bad_format",
            f"{self._path.name} is not a whole safetensors file: {reason}; copy it again or save it with PEFT's "
            "save_pretrained",
        )


def open_regular(path: Path) -> int:
    """Open a regular file and return its descriptor. Raises AdapterError ``not_found`` or ``bad_format``."""
    # Without O_NONBLOCK, opening a named pipe would wait for a writer.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise AdapterError(
            "not_found", f"{path} is missing; name a directory that PEFT's save_pretrained wrote"
        ) from None
    except OSError as error:
        raise AdapterError("bad_format", f"{path}: {error.strerror}; the store must be able to read it") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise AdapterError("bad_format", f"{path} is not a regular file; copy the adapter's own file there")
    return fd
