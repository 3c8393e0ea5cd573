"""Files that keep the planner's state over restarts: the last complete plan and the drained engines."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from loraserve.disk import sync_to_disk
from loraserve.log import get_logger
from loraserve.messages import Plan

PLAN_NAME = "plan.json"
DRAINED_NAME = "drained.json"

T = TypeVar("T")
log = get_logger(__name__)


class PlanFiles:
    """Reads and atomically replaces the planner's files. A crash leaves either the old or the new content.

    Writes block until the content is on disk, so call them in a thread.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read_plan(self) -> Plan | None:
        """Return the last complete plan, or None if its file is missing or unreadable. Renames an unreadable file."""
        return self._read(PLAN_NAME, Plan)

    def read_drained(self) -> frozenset[str]:
        """Return the drained engines; none if the file is missing or unreadable. Renames an unreadable file."""
        return self._read(DRAINED_NAME, frozenset[str]) or frozenset()

    def write_plan(self, plan: Plan) -> None:
        """Replace the plan on disk. Raises OSError if the write fails; the file then keeps the old plan."""
        self._write(PLAN_NAME, plan)

    def write_drained(self, engines: Iterable[str]) -> None:
        """Replace the list of drained engines on disk. Raises OSError and keeps the old list if the write fails."""
        self._write(DRAINED_NAME, sorted(engines))

    def _read(self, name: str, kind: type[T]) -> T | None:
        file = self._folder / name
        try:
            return msgspec.json.decode(file.read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            # msgspec does not wrap UnicodeDecodeError (a ValueError) and RecursionError in DecodeError.
            remedy = "it is set aside, and the next plan is written to a new file"
            log.error("file_unreadable", file=str(file), reason=str(error), remedy=remedy)
            try:
                file.replace(file.with_suffix(".unreadable"))
            except OSError as refusal:
                # A broken disk must not keep the planner from starting.
                log.error("file_not_set_aside", file=str(file), reason=str(refusal))
            return None

    def _write(self, name: str, content: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / name
        # The name is fixed, so that the next planner overwrites the temporary file of a killed one.
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
            # Otherwise a power cut could restore a plan older than the epoch of the engines.
            sync_to_disk(self._folder)
        except OSError as error:
            # All readers see the new content from now on, so it is in force although a power cut could revert it.
            log.error("folder_not_synced", folder=str(self._folder), reason=str(error))
