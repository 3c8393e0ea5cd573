"""The last complete plan on disk, so that a planner that dies takes no plan with it."""

import os
from pathlib import Path

import msgspec

from loraserve.messages import Plan

FILE_NAME = "plan.json"


class Epochs:
    """Reads and replaces the plan file; a crash leaves the old or the new plan, never half of one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / FILE_NAME

    def read(self) -> Plan | None:
        """The last complete plan; None where there is none or it cannot be read (it is then set aside)."""
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=Plan)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            # msgspec passes on text that is no UTF-8, and nesting without end, as they are.
            self._file.replace(self._file.with_suffix(".unreadable"))
            return None

    def write(self, plan: Plan) -> None:
        """Raises OSError where the disk refuses; the old plan then stays."""
        self._folder.mkdir(parents=True, exist_ok=True)
        # One name for all: what a killed planner left behind is written over by the next.
        temporary = self._file.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                file.write(msgspec.json.encode(plan))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._file)
        finally:
            temporary.unlink(missing_ok=True)
