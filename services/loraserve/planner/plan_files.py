"""What the planner must not forget, on disk: the last complete plan, and which engines are drained."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from loraserve.log import get_logger
from loraserve.messages import Plan

FILE_NAME = "plan.json"
DRAINED_NAME = "drained.json"

T = TypeVar("T")
log = get_logger(__name__)


class Epochs:
    """Reads and replaces the planner's files; a crash leaves the old or the new content, never half of one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self) -> Plan | None:
        """The last complete plan; None where there is none or it cannot be read (it is then set aside)."""
        return self._read(FILE_NAME, Plan)

    def read_drained(self) -> frozenset[str]:
        """Engines that are to stay empty; none where that cannot be read."""
        return self._read(DRAINED_NAME, frozenset[str]) or frozenset()

    def write(self, plan: Plan) -> None:
        """Raises OSError where the disk refuses; the old plan then stays."""
        self._write(FILE_NAME, plan)

    def write_drained(self, engines: Iterable[str]) -> None:
        """Raises OSError where the disk refuses; what was drained then stays so."""
        self._write(DRAINED_NAME, sorted(engines))

    def _read(self, name: str, kind: type[T]) -> T | None:
        file = self._folder / name
        try:
            return msgspec.json.decode(file.read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            # msgspec passes on text that is no UTF-8, and nesting without end, as they are.
            log.error("file_unreadable", file=str(file), reason=str(error), remedy="it is set aside, and written anew")
            try:
                file.replace(file.with_suffix(".unreadable"))
            except OSError as refusal:
                # The planner does without, all the same: a disk that is broken must not keep it from starting.
                log.error("file_not_set_aside", file=str(file), reason=str(refusal))
            return None

    def _write(self, name: str, content: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / name
        # One name for all: what a killed planner left behind is written over by the next.
        temporary = file.with_suffix(".tmp")
        try:
            with temporary.open("wb") as half:
                half.write(msgspec.json.encode(content))
                half.flush()
                os.fsync(half.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        try:
            _sync_folder(self._folder)
        except OSError as error:
            # Whoever reads the file from now on finds the new content: it is in force, whatever a power cut may do.
            log.error("folder_not_synced", folder=str(self._folder), reason=str(error))


def _sync_folder(folder: Path) -> None:
    """Until then a power cut may bring the file before back, which engines have moved on from."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
