"""The adapter registry: names and their versions in an SQLite database.

All methods may block and may be called from any thread. Each change is one durable transaction.
"""

import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

import msgspec

from loraserve.errors import AdapterError, LoraServeError
from loraserve.messages import AdapterRef
from loraserve.store.disk import storage_error

CLOSE_TIMEOUT_S = 2.0
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE adapters (
    name TEXT PRIMARY KEY, version TEXT NOT NULL, rank INTEGER NOT NULL, slab_bytes INTEGER NOT NULL,
    source TEXT NOT NULL, created_unix_s REAL NOT NULL
);
CREATE TABLE revision (value INTEGER NOT NULL);
"""


class AdapterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A registered adapter. ``source`` is the PEFT directory that it was packed from."""

    name: str
    version: str
    rank: int
    slab_bytes: int
    source: str
    created_unix_s: float

    def ref(self) -> AdapterRef:
        return AdapterRef(name=self.name, version=self.version, rank=self.rank, slab_bytes=self.slab_bytes)


class Snapshot(msgspec.Struct, frozen=True):
    """The content of the registry at one revision. ``records`` maps names to records."""

    revision: int
    records: Mapping[str, AdapterRecord]

    def refs(self) -> tuple[AdapterRef, ...]:
        return tuple(record.ref() for record in self.records.values())

    def versions(self) -> set[str]:
        return {record.version for record in self.records.values()}


class AdapterRegistry:
    """An open registry database. ``snapshot`` is a copy of its content, replaced after each transaction."""

    def __init__(self, path: Path, now: float) -> None:
        """Open or create the database. Raises LoraServeError if the file is not a usable registry of this version."""
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._create_tables(now)
            self.snapshot = self._read_snapshot()
        except sqlite3.Error as error:
            raise LoraServeError(
                f"adapter registry {path}: {error}; if it is damaged, move it away and register all adapters again"
            ) from error

    def put(self, record: AdapterRecord, replace: bool) -> bool:
        """Register a version under a name. Returns False if the name already has this version.

        Raises AdapterError: ``duplicate`` if the name has another version and ``replace`` is False, ``disk_full`` or
        ``storage`` if the disk fails.
        """
        with self._lock:
            known = self.snapshot.records.get(record.name)
            if known is not None and known.version == record.version:
                return False
            if known is not None and not replace:
                raise AdapterError(
                    "duplicate",
                    f"adapter {record.name!r} is already registered with other content; unregister it, choose another "
                    "name or set replace",
                )
            self._commit(
                f"adapter {record.name!r}",
                {**self.snapshot.records, record.name: record},
                "REPLACE INTO adapters VALUES (:name, :version, :rank, :slab_bytes, :source, :created_unix_s)",
                msgspec.structs.asdict(record),
            )
            return True

    def remove(self, name: str) -> AdapterRecord:
        """Remove a name and return its record. Raises AdapterError ``not_found``, ``disk_full`` or ``storage``."""
        with self._lock:
            known = self.snapshot.records.get(name)
            if known is None:
                raise AdapterError(
                    "not_found", f"adapter {name[:200]!r} is not registered; list the adapters to see the names"
                )
            records = {other: record for other, record in self.snapshot.records.items() if other != name}
            self._commit(f"the removal of {name!r}", records, "DELETE FROM adapters WHERE name = :name", {"name": name})
            return known

    def validate(self) -> None:
        """Raise AssertionError if the database is damaged or differs from the snapshot."""
        with self._lock:
            assert self._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert self.snapshot == self._read_snapshot()

    def reuse_log(self) -> None:
        """Let the next change overwrite SQLite's log from its start, so that the log need not grow on a full disk."""
        with self._lock, suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(RESTART)")

    def close(self) -> None:
        """Close the database, unless another thread is still inside a change because the disk does not answer."""
        # The next start recovers the content, so a stopping process must not wait for such a disk.
        if self._lock.acquire(timeout=CLOSE_TIMEOUT_S):
            try:
                self._db.close()
            finally:
                self._lock.release()

    def _create_tables(self, now: float) -> None:
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        if found == _SCHEMA_VERSION:
            return
        if found != 0:
            raise sqlite3.DatabaseError(f"its schema version is {found}, this release reads {_SCHEMA_VERSION}")
        with self._transaction():
            for statement in filter(str.strip, _SCHEMA.split(";")):
                self._db.execute(statement)
            # Revisions start at the current time, so that they also increase after the folder was deleted.
            self._db.execute("INSERT INTO revision VALUES (?)", (int(now),))
            self._db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    def _commit(
        self, what: str, records: dict[str, AdapterRecord], statement: str, values: Mapping[str, object]
    ) -> None:
        """Execute ``statement`` and increment the revision durably. ``records`` is the new content of ``snapshot``."""
        try:
            with self._transaction():
                self._db.execute(statement, values)
                self._db.execute("UPDATE revision SET value = value + 1")
        except sqlite3.Error as error:
            raise storage_error(error, what) from error
        self.snapshot = Snapshot(self.snapshot.revision + 1, MappingProxyType(records))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # After some failures SQLite has already rolled back.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _read_snapshot(self) -> Snapshot:
        revision = self._db.execute("SELECT value FROM revision").fetchone()[0]
        rows = self._db.execute("SELECT * FROM adapters ORDER BY name")
        names = [column[0] for column in rows.description]
        records = (AdapterRecord(**dict(zip(names, row, strict=True))) for row in rows)
        return Snapshot(revision, MappingProxyType({record.name: record for record in records}))


def read_sources(path: Path) -> dict[str, str]:
    """Return {name: source directory} of another registry file, or {} if the file cannot be read."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            return dict(db.execute("SELECT name, source FROM adapters"))
    except sqlite3.Error:
        return {}
