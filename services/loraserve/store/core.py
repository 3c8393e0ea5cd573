"""Registers adapters: checks and packs PEFT directories, and keeps their names and slabs on disk.

All methods may block and may be called from any thread.
"""

import contextlib
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
from loraserve.errors import AdapterError
from loraserve.messages import AdapterRef
from loraserve.model_shape import ModelShape
from loraserve.store.disk import SpaceReserve, lock_folder, storage_error
from loraserve.store.registry import AdapterRecord, AdapterRegistry, read_sources
from loraserve.store.slabs import SlabFiles

GRACE_S = 600.0
"""Time that a slab without a name stays on disk. Engines need less time to fetch a slab."""
REGISTRY_FILE = "registry.sqlite"
RESERVE_FILE = "reserve"
RESERVE_BYTES = 1 << 20
"""Space for removals on a full disk. One removal changes a few database pages of 4 KiB."""


class StoreLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits on the adapters that may be registered.

    ``served_model`` is the base model's name, which no adapter may use. ``pool_bytes`` is None if the store does not
    know the engines' pool size. An empty ``allowed_dirs`` allows every directory.
    """

    served_model: str
    max_rank: int
    engine_max_rank: int
    pool_bytes: int | None
    allowed_dirs: tuple[str, ...] = ()


class AdapterStore:
    """The adapters of one model shape, slab dtype and slab format. Each combination has a folder under ``root``."""

    def __init__(self, root: Path, shape: ModelShape, dtype: Dtype, limits: StoreLimits, now: float) -> None:
        """Open or create the store's folder. Raises LoraServeError if it or its registry is unusable or in use."""
        self._shape = shape
        self._dtype: Dtype = dtype
        self._limits = limits
        self._root = root
        self.folder = root / namespace(shape, dtype)
        self._lock_fd = lock_folder(self.folder)
        try:
            self._reserve = SpaceReserve(self.folder / RESERVE_FILE, RESERVE_BYTES)
            # SQLite needs some space to open the database.
            self._reserve.release()
            self.registry = AdapterRegistry(self.folder / REGISTRY_FILE, now)
            self.slabs = SlabFiles(self.folder)
            # On a full disk the store starts with a smaller reserve, and refuses registrations.
            with contextlib.suppress(OSError):
                self._reserve.fill()
        except BaseException:
            os.close(self._lock_fd)
            raise

    def register(self, name: str, path: str, replace: bool, now: float) -> tuple[AdapterRef, bool]:
        """Check and pack the PEFT directory at ``path`` and register it durably under ``name``.

        Returns the adapter, and False if the name already had this content, else True. Raises AdapterError.
        """
        check_name(name, self._limits.served_model)
        directory = allowed_directory(path, self._limits.allowed_dirs)
        slab = pack_peft(directory, self._shape, self._dtype, self._limits.max_rank)
        self._check_fits_engines(slab)
        if not self._is_registered(name, slab.version):
            self._fill_reserve(name)
        # The slab is written before its name, so that a crash in between leaves no name without a slab.
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
        """Remove the name, also on a full disk. Its slab stays for at least ``GRACE_S``.

        Raises AdapterError: ``not_found``, ``storage``, or ``disk_full`` if other programs took the reserved space too.
        """
        self._start_grace(name, now)
        try:
            self.registry.remove(name)
        except AdapterError as error:
            if error.code != "disk_full":
                raise
            self._reserve.release()
            self.registry.reuse_log()
            self.registry.remove(name)
            with contextlib.suppress(OSError):
                self._reserve.fill()

    def collect_garbage(self, now: float) -> list[str]:
        """Remove slabs that have no name and were not opened or stored for ``GRACE_S``. Returns their versions."""
        return self.slabs.remove_unreferenced(self.registry.snapshot.versions(), now, GRACE_S)

    def missing_slabs(self) -> list[str]:
        """Return the names whose slab is not on disk. To restore a slab, register its adapter again."""
        present = self.slabs.versions()
        return [name for name, record in self.registry.snapshot.records.items() if record.version not in present]

    def outdated_adapters(self) -> dict[str, str]:
        """Return {name: source directory} of adapters that are registered only in an earlier slab format."""
        found: dict[str, str] = {}
        for slab_format in range(1, SLAB_FORMAT):
            found |= read_sources(self._root / namespace(self._shape, self._dtype, slab_format) / REGISTRY_FILE)
        return {name: source for name, source in found.items() if name not in self.registry.snapshot.records}

    def validate(self) -> None:
        """Raise AssertionError or AdapterError if the registry or a registered slab is damaged. Reads all slabs."""
        self.registry.validate()
        for record in self.registry.snapshot.records.values():
            opened = self.slabs.verify(record.version)
            assert opened.slab_bytes == record.slab_bytes, record.name

    def close(self) -> None:
        self.registry.close()
        os.close(self._lock_fd)

    def _is_registered(self, name: str, version: str) -> bool:
        known = self.registry.snapshot.records.get(name)
        return known is not None and known.version == version

    def _fill_reserve(self, name: str) -> None:
        # A registration must leave the space that later removals need.
        try:
            self._reserve.fill()
        except OSError as error:
            raise storage_error(error, f"adapter {name!r}") from error

    def _start_grace(self, name: str, now: float) -> None:
        # Called before the registry changes, so that a crash in between cannot shorten the grace period.
        known = self.registry.snapshot.records.get(name)
        if known is not None:
            with contextlib.suppress(AdapterError):
                self.slabs.touch(known.version, now)

    def _check_fits_engines(self, slab: Slab) -> None:
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
                f"the packed adapter needs an extent of {needed} bytes; with engine.pool_bytes = "
                f"{self._limits.pool_bytes} the largest extent has {largest}; raise engine.pool_bytes or train with a "
                "smaller rank",
            )


def namespace(shape: ModelShape, dtype: Dtype, slab_format: int = SLAB_FORMAT) -> str:
    """Return the folder name for a model shape, dtype and slab format."""
    key = msgspec.msgpack.encode((slab_format, shape, dtype))
    return f"{dtype}-{hashlib.sha256(key).hexdigest()[:16]}"


def allowed_directory(path: str, allowed_dirs: Sequence[str]) -> Path:
    """Return the absolute ``path`` without symbolic links. Raises AdapterError if it is not under ``allowed_dirs``.

    The same check applies to the targets of the adapter's files. An empty ``allowed_dirs`` allows all paths.
    """
    if "\0" in path or not Path(path).is_absolute():
        raise AdapterError("bad_format", f"path {path[:200]!r} must be absolute, as seen on the store's machine")
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
