"""Registration without the bus: adapters in, names and slabs out. Every method blocks; any thread may call it."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from loraserve.adapter.format import SLAB_FORMAT, Dtype
from loraserve.adapter.pack import Slab, pack_peft
from loraserve.adapter.peft import CONFIG_FILE, WEIGHTS_FILE
from loraserve.adapter.validate import check_name
from loraserve.cost import extent_bytes, largest_extent_bytes
from loraserve.errors import AdapterError, LoraServeError
from loraserve.messages import AdapterRef
from loraserve.model_shape import ModelShape
from loraserve.store.registry import AdapterRecord, AdapterRegistry, packed_from
from loraserve.store.slabs import Slabs

GRACE_S = 600.0
"""How long a slab without a name stays: longer than any engine takes to fetch it."""
REGISTRY_FILE = "registry.sqlite"


class StoreLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What may be registered. ``allowed_dirs`` empty allows any directory; ``served_model`` is no adapter's name.

    ``pool_bytes`` is None where the engines' pools are not known here.
    """

    served_model: str
    max_rank: int
    engine_max_rank: int
    pool_bytes: int | None
    allowed_dirs: tuple[str, ...] = ()


class AdapterStore:
    """The adapters of one model shape and slab dtype, each kind in a folder of its own under ``root``."""

    def __init__(self, root: Path, shape: ModelShape, dtype: Dtype, limits: StoreLimits, now: float) -> None:
        """Raises LoraServeError where another process uses the folder or the registry cannot be read."""
        self._shape = shape
        self._dtype: Dtype = dtype
        self._limits = limits
        self._root = root
        self.folder = root / namespace(shape, dtype)
        self._lock_fd = _lock(self.folder)
        try:
            self.registry = AdapterRegistry(self.folder / REGISTRY_FILE, now)
            self.slabs = Slabs(self.folder)
        except BaseException:
            os.close(self._lock_fd)
            raise

    def register(self, name: str, path: str, replace: bool, now: float) -> tuple[AdapterRef, bool]:
        """Check, pack and keep the PEFT directory at ``path``; the name means it once this returns.

        The second value is False where the name meant the same content before. Raises AdapterError.
        """
        check_name(name, self._limits.served_model)
        directory = allowed_directory(path, self._limits.allowed_dirs)
        slab = pack_peft(directory, self._shape, self._dtype, self._limits.max_rank)
        self._check_fits_engines(slab)
        # The slab is on disk before its name: after a crash in between it is garbage, never a name without content.
        self.slabs.put(slab, now)
        record = AdapterRecord(
            name=name,
            version=slab.version,
            rank=slab.header.rank,
            slab_bytes=slab.header.slab_bytes,
            source=str(directory),
            created_unix_s=now,
        )
        self._start_grace(name, now)
        return record.ref(), self.registry.put(record, replace)

    def unregister(self, name: str, now: float) -> None:
        """Forget the name; its slab stays for the grace. Raises AdapterError ``not_found``."""
        self._start_grace(name, now)
        self.registry.remove(name)

    def collect_garbage(self, now: float) -> list[str]:
        """Remove slabs that no name has needed for ``GRACE_S``; returns their versions."""
        return self.slabs.remove_unreferenced(self.registry.snapshot.versions(), now, GRACE_S)

    def missing(self) -> list[str]:
        """Names whose slab is not on disk; registering them again brings it back."""
        present = self.slabs.versions()
        return [name for name, record in self.registry.snapshot.records.items() if record.version not in present]

    def left_behind(self) -> dict[str, str]:
        """Names that only a store of an earlier slab format knows, and the directory that each was packed from."""
        found: dict[str, str] = {}
        for slab_format in range(1, SLAB_FORMAT):
            found |= packed_from(self._root / namespace(self._shape, self._dtype, slab_format) / REGISTRY_FILE)
        return {name: source for name, source in found.items() if name not in self.registry.snapshot.records}

    def validate(self) -> None:
        """Assert that the registry is sound and every name's slab is there and intact. Reads all slabs."""
        self.registry.validate()
        for record in self.registry.snapshot.records.values():
            opened = self.slabs.verify(record.version)
            assert opened.slab_bytes == record.slab_bytes, record.name

    def close(self) -> None:
        self.registry.close()
        os.close(self._lock_fd)

    def _start_grace(self, name: str, now: float) -> None:
        """Before a name lets go of its version, not after: a crash in between must not shorten the grace."""
        known = self.registry.snapshot.records.get(name)
        if known is not None:
            with contextlib.suppress(AdapterError):
                self.slabs.touch(known.version, now)

    def _check_fits_engines(self, slab: Slab) -> None:
        """What no engine could ever hold would answer every request with a refusal."""
        rank, most = slab.header.rank, self._limits.engine_max_rank
        if rank > most:
            raise AdapterError(
                "bad_rank",
                f"the adapter has rank {rank}, engine.max_rank is {most}; raise engine.max_rank or train with a "
                "smaller rank",
            )
        if self._limits.pool_bytes is None:
            return
        needed, largest = extent_bytes(slab.header.slab_bytes), largest_extent_bytes(self._limits.pool_bytes)
        if needed > largest:
            raise AdapterError(
                "too_large",
                f"packed it needs an extent of {needed} bytes, engine.pool_bytes = {self._limits.pool_bytes} can give "
                f"{largest} at most; raise engine.pool_bytes or train with a smaller rank",
            )


def namespace(shape: ModelShape, dtype: Dtype, slab_format: int = SLAB_FORMAT) -> str:
    """Folder name for what a slab must fit, so that another model, dtype or format never meets slabs of this one."""
    key = msgspec.msgpack.encode((slab_format, shape, dtype))
    return f"{dtype}-{hashlib.sha256(key).hexdigest()[:16]}"


def allowed_directory(path: str, allowed_dirs: Sequence[str]) -> Path:
    """The directory that ``path`` leads to. Raises AdapterError ``forbidden`` outside of ``allowed_dirs``.

    Its files count where their links lead: a link out of an allowed directory does not let a reader out.
    """
    if "\0" in path or not Path(path).is_absolute():
        raise AdapterError("bad_format", f"path {path[:200]!r} must be absolute, as the store's machine sees it")
    directory = Path(path)
    try:
        real = [file.resolve() for file in (directory, directory / CONFIG_FILE, directory / WEIGHTS_FILE)]
        allowed = [Path(folder).resolve() for folder in allowed_dirs]
    except (OSError, RuntimeError) as error:
        raise AdapterError("not_found", f"path {path[:200]!r}: {error}") from error
    if allowed and not all(any(file.is_relative_to(folder) for folder in allowed) for file in real):
        raise AdapterError(
            "forbidden", f"path {path[:200]!r} is not under store.allowed_dirs ({', '.join(allowed_dirs)})"
        )
    return real[0]


def _lock(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LoraServeError(f"{folder}: {error.strerror}; cluster.data_dir must be a folder to write to") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise LoraServeError(
            f"{folder} is in use by another store; stop it, or give this one another cluster.data_dir"
        ) from error
    return fd
