"""Controls the faults of one process while it runs.

The library ``shim.c`` makes its disk slow, stuck or full and its clock wrong. ``bus.py`` disturbs its messages.
"""

import hashlib
import mmap
import os
import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
_LAYOUT = struct.Struct("7q256s")
"""The first four numbers are those of ``shim.c``."""
_VALUE = struct.Struct("q")
_DELAY_US, _STUCK, _FREE_BYTES, _CLOCK_US, _LOST, _DOUBLED, _DELAYED = range(7)
_NO_FAULTS = _LAYOUT.pack(0, 0, -1, 0, 0, 0, 0, b"")
_PER_MILLION = 1_000_000


def has_compiler() -> bool:
    """Return whether this machine can compile and preload the library: Linux with a C compiler."""
    return Path("/proc/self/fd").exists() and shutil.which("cc") is not None


def build_shim(folder: Path) -> Path:
    """Compile the library into ``folder``, unless it is there, and return its path. Raises CalledProcessError."""
    source = SOURCE.read_bytes()
    library = folder / f"shim-{hashlib.sha256(source).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        half = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(half), str(SOURCE), "-ldl"], check=True)
        half.replace(library)
    return library


class Shim:
    """The faults of one process. They begin and end while the process runs.

    ``file`` holds the values that the library reads. ``root`` is the path prefix of the files on the faulty disk.
    """

    def __init__(self, library: Path, file: Path, root: Path) -> None:
        self._library = library
        self._file = file
        self._root = root
        if not file.exists():
            file.write_bytes(_NO_FAULTS)
        with file.open("r+b") as opened:
            self._values = mmap.mmap(opened.fileno(), len(_NO_FAULTS))

    def environment(self) -> dict[str, str]:
        """Return the variables with which the process must be started."""
        return {
            "LD_PRELOAD": str(self._library),
            "FAULT_SHIM_FILE": str(self._file),
            "FAULT_SHIM_ROOT": str(self._root),
        }

    def delay_disk(self, seconds: float) -> None:
        """Make each read, write, flush, rename and removal take this much longer."""
        self._set(_DELAY_US, round(seconds * 1e6))

    def block_disk(self, blocked: bool) -> None:
        """Let writes, flushes, renames and removals wait until the disk is no longer blocked."""
        self._set(_STUCK, int(blocked))

    def limit_disk(self, free_bytes: int | None) -> None:
        """Leave ``free_bytes`` bytes free on the disk. None is a disk without a limit."""
        self._set(_FREE_BYTES, -1 if free_bytes is None else free_bytes)

    def free_bytes(self) -> int:
        """Return how many bytes are free on a disk with a limit."""
        return int(_VALUE.unpack_from(self._values, _FREE_BYTES * _VALUE.size)[0])

    def step_clock(self, seconds: float) -> None:
        """Let the wall clock be ``seconds`` ahead of the machine's. Negative values put it back."""
        self._set(_CLOCK_US, round(seconds * 1e6))

    def disturb_messages(self, *, lost: float = 0.0, doubled: float = 0.0, delayed: float = 0.0) -> None:
        """Set the shares of the process's messages, in both directions, that are lost, doubled or overtaken."""
        for index, share in ((_LOST, lost), (_DOUBLED, doubled), (_DELAYED, delayed)):
            self._set(index, round(share * _PER_MILLION))

    def cut_off(self, *peers: str) -> None:
        """Let the process receive nothing from these peers. Cut both sides for a partition."""
        names = " ".join(peers).encode()
        self._values[7 * _VALUE.size : _LAYOUT.size] = names.ljust(_LAYOUT.size - 7 * _VALUE.size, b"\0")

    def message_faults(self) -> tuple[float, float, float, frozenset[str]]:
        """Return the shares of lost, doubled and overtaken messages, and the peers that are cut off."""
        *_, lost, doubled, delayed, names = _LAYOUT.unpack_from(self._values)
        cut = frozenset(names.rstrip(b"\0").decode().split())
        return lost / _PER_MILLION, doubled / _PER_MILLION, delayed / _PER_MILLION, cut

    def heal(self) -> None:
        """End all faults."""
        self._values[:] = _NO_FAULTS

    def _set(self, index: int, value: int) -> None:
        _VALUE.pack_into(self._values, index * _VALUE.size, value)
