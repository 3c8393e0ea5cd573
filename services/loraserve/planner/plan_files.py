"""The planner's state on disk, which survives restarts: the last complete plan, and the drained engines."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from loraserve.log import get_logger
from loraserve.messages import Plan

PLAN_NAME = "plan.json"
DRAINED_NAME = "drained.json"

T = TypeVar("T")
log = get_logger(__name__)


class PlanFiles:
    """Reads and replaces the planner's files. A crash leaves the old or the new content, never a part of one.

    Writes block until the disk has the content: call them in a thread.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read_plan(self) -> Plan | None:
        """Return the last complete plan; None if there is none or it is unreadable, in which case it is set aside."""
        return self._read(PLAN_NAME, Plan)

    def read_drained(self) -> frozenset[str]:
        """Return the engines that must stay empty; none if the file is unreadable."""
        return self._read(DRAINED_NAME, frozenset[str]) or frozenset()

    def write_plan(self, plan: Plan) -> None:
        """Replace the plan; raises OSError if the disk refuses, and the old plan then stays."""
        self._write(PLAN_NAME, plan)

    def write_drained(self, engines: Iterable[str]) -> None:
        """Replace the drained engines; raises OSError if the disk refuses, and the old ones then stay."""
        self._write(DRAINED_NAME, sorted(engines))

    def _read(self, name: str, kind: type[T]) -> T | None:
        file = self._folder / name
        try:
            return msgspec.json.decode(file.read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            # msgspec raises UnicodeDecodeError and RecursionError as they are.
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
        # With a fixed name, the next planner overwrites what a killed one left behind.
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
            # Every reader finds the new content from now on, so it is in force, whatever a power cut may do.
            log.error("folder_not_synced", folder=str(self._folder), reason=str(error))


def _sync_folder(folder: Path) -> None:
    """Sync the directory entry; until then a power cut may bring the old file back, which engines are past."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
