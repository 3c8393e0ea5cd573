"""Stores slabs (packed adapters) in files named by digest. Files are written under a temporary name, then renamed.

A file consists of magic bytes, the header's length, the header, zero padding to ``DATA_ALIGN_BYTES``, and the slab. Its
modification time is the time when the slab was last stored or opened. The grace period before removal starts then. All
methods may block and may be called from any thread.
"""

import contextlib
import itertools
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec
from blake3 import blake3

from loraserve.adapter.format import SlabHeader, decode_header, encode_header, slab_version
from loraserve.adapter.pack import Slab
from loraserve.config import MAX_SLAB_READ_BYTES
from loraserve.disk import sync_to_disk
from loraserve.errors import AdapterError
from loraserve.store.disk import storage_error, write_durably

MAGIC = b"LORASLB2"
DATA_ALIGN_BYTES = 4096
_PREFIX_BYTES = len(MAGIC) + 8
_MAX_HEADER_BYTES = 16 << 20
_HASH_BYTES = 4 << 20
_VERSION = re.compile(r"[0-9a-f]{64}")


class OpenedSlab(msgspec.Struct, frozen=True):
    """A verified slab: its encoded header and the offset of its data in the file, in bytes."""

    version: str
    header: bytes
    data_begin: int
    slab_bytes: int


class SlabFiles:
    """The slab files of one folder. Only one process may use the folder at a time."""

    def __init__(self, root: Path) -> None:
        self._slabs = root / "slabs"
        self._tmp = root / "tmp"
        self._opened: dict[str, OpenedSlab] = {}
        self._names = itertools.count()
        # Held while a file is renamed, touched or removed. Data is written without the lock.
        self._lock = threading.Lock()
        for folder in (self._slabs, self._tmp):
            folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._tmp.iterdir():
            leftover.unlink()

    def put(self, slab: Slab, now: float) -> bool:
        """Store a slab durably. Returns False if an intact copy exists. Raises AdapterError on a disk failure."""
        if self._is_intact(slab.version, now):
            return False
        header = encode_header(slab.header)
        path = self._path(slab.version)
        tmp = self._tmp / f"{slab.version}.{next(self._names)}"
        try:
            path.parent.mkdir(exist_ok=True)
            write_durably(tmp, _file_blocks(header, slab.data))
            os.utime(tmp, (now, now))
            with self._lock:
                tmp.rename(path)
            sync_to_disk(path.parent)
            sync_to_disk(self._slabs)
        except OSError as error:
            tmp.unlink(missing_ok=True)
            raise storage_error(error, f"{slab.header.slab_bytes} bytes of slab {slab.version}") from error
        self._opened[slab.version] = OpenedSlab(slab.version, header, _data_begin(header), slab.header.slab_bytes)
        return True

    def open(self, version: str, now: float) -> OpenedSlab:
        """Return a slab's header and data offset, and restart its grace period.

        The first open of a slab that an earlier process stored verifies it. Raises AdapterError ``not_found``,
        ``corrupt`` or ``storage``. A corrupt file is renamed to *.corrupt.
        """
        self.touch(version, now)
        opened = self._opened.get(version)
        if opened is None:
            opened = self._opened[version] = self.verify(version)
        return opened

    def touch(self, version: str, now: float) -> None:
        """Restart the grace period before the slab's removal. Raises AdapterError ``not_found``."""
        with self._lock:
            path = self._existing_path(version)
            # On a read-only disk reads must still work, and no slab can be removed anyway.
            with contextlib.suppress(OSError):
                os.utime(path, (now, now))

    def verify(self, version: str) -> OpenedSlab:
        """Read the whole slab and check its digests. Raises the errors of `open`."""
        try:
            with self._existing_path(version).open("rb") as file:
                data, header = _read_header(file)
                intact = header is not None and slab_version(header) == version and _layers_match(file, data, header)
        except OSError as error:
            raise storage_error(error, f"slab {version}") from error
        if header is None or not intact:
            raise self._set_aside(version)
        return OpenedSlab(version, data, _data_begin(data), header.slab_bytes)

    def read(self, version: str, offset: int, length: int, now: float) -> bytes:
        """Return ``length`` bytes of the slab from ``offset`` on. Raises AdapterError ``bad_range`` or as `open`."""
        opened = self._opened.get(version) or self.open(version, now)
        if not (offset >= 0 and 0 < length <= MAX_SLAB_READ_BYTES and offset + length <= opened.slab_bytes):
            raise AdapterError(
                "bad_range",
                f"offset_bytes {offset}, length_bytes {length}: read 1 to {MAX_SLAB_READ_BYTES} bytes within "
                f"the slab's {opened.slab_bytes}",
            )
        try:
            fd = os.open(self._existing_path(version), os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.pread(fd, length, opened.data_begin + offset)
            finally:
                os.close(fd)
        except OSError as error:
            raise storage_error(error, f"slab {version}") from error
        if len(data) != length:
            raise self._set_aside(version)
        return data

    def versions(self) -> dict[str, float]:
        """Return {version: unix time of the last store or open} of all slabs on disk."""
        used = {}
        for path in self._slabs.glob("*/*.slab"):
            if _VERSION.fullmatch(path.stem):
                # Another thread may rename a damaged file at this moment.
                with contextlib.suppress(FileNotFoundError):
                    used[path.stem] = path.stat().st_mtime
        return used

    def remove_unreferenced(self, referenced: Collection[str], now: float, grace_s: float) -> list[str]:
        """Remove the slabs that ``removable`` selects. Returns their versions."""
        removed = []
        for version in removable(self.versions(), referenced, now, grace_s):
            path = self._path(version)
            with self._lock, contextlib.suppress(FileNotFoundError):
                # Checked again, because the slab may have been opened or stored since the list was made.
                if removable({version: path.stat().st_mtime}, referenced, now, grace_s):
                    path.unlink()
                    self._opened.pop(version, None)
                    removed.append(version)
        return removed

    def _is_intact(self, version: str, now: float) -> bool:
        # Always verifies, because users register an adapter again to repair a damaged slab.
        try:
            # Touched first, so that the slab is not removed while it is read.
            self.touch(version, now)
            self.verify(version)
        except AdapterError as error:
            if error.code in ("not_found", "corrupt"):
                return False
            raise
        return True

    def _path(self, version: str) -> Path:
        return self._slabs / version[:2] / f"{version}.slab"

    def _existing_path(self, version: str) -> Path:
        # The version comes from a message, so it must be a digest before it may be used in a path.
        if _VERSION.fullmatch(version) and (path := self._path(version)).exists():
            return path
        raise AdapterError("not_found", f"slab {version[:80]} is not in the store; register the adapter again")

    def _set_aside(self, version: str) -> AdapterError:
        path = self._path(version)
        with self._lock, contextlib.suppress(FileNotFoundError):
            path.rename(path.with_suffix(".corrupt"))
            self._opened.pop(version, None)
        return AdapterError(
            "corrupt",
            f"slab {version} is damaged on disk or of another format; it was renamed to {path.stem[:12]}...corrupt; "
            "register the adapter again",
        )


def removable(last_used: Mapping[str, float], referenced: Collection[str], now: float, grace_s: float) -> list[str]:
    """Return the versions that are not ``referenced`` and were not stored or opened for ``grace_s`` seconds.

    During the grace period an engine may still fetch a version whose name was removed. A registration may still add the
    name of a slab that it has stored. ``last_used`` and ``now`` are unix times.
    """
    return sorted(v for v, used in last_used.items() if v not in referenced and now - used > grace_s)


def _read_header(file: BinaryIO) -> tuple[bytes, SlabHeader | None]:
    """Return the encoded and the decoded header. The decoded one is None if the file is no slab of this format."""
    prefix = file.read(_PREFIX_BYTES)
    length = int.from_bytes(prefix[len(MAGIC) :], "little")
    if not prefix.startswith(MAGIC) or length > _MAX_HEADER_BYTES:
        return b"", None
    data = file.read(length)
    try:
        return data, decode_header(data)
    except msgspec.MsgspecError:
        return data, None


def _layers_match(file: BinaryIO, data: bytes, header: SlabHeader) -> bool:
    """Return whether every layer matches its digest and the file ends after the last layer."""
    file.seek(_data_begin(data))
    for layer, digest in enumerate(header.layer_digests):
        found = blake3()
        left = len(header.layer(layer))
        while left and (block := file.read(min(left, _HASH_BYTES))):
            found.update(block)
            left -= len(block)
        if found.digest() != digest:
            return False
    return not file.read(1)


def _data_begin(header: bytes) -> int:
    return -(-(_PREFIX_BYTES + len(header)) // DATA_ALIGN_BYTES) * DATA_ALIGN_BYTES


def _file_blocks(header: bytes, data: memoryview) -> Iterator[bytes | memoryview]:
    start = MAGIC + len(header).to_bytes(8, "little") + header
    yield start.ljust(_data_begin(header), b"\0")
    yield data
