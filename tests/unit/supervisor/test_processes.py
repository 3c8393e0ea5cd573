"""The reported reason of a process that ended, and the environment of a child."""

from pathlib import Path

from loraserve.config import Config
from loraserve.supervisor.processes import REASON_LINES, environment, exit_reason


def write(folder: Path, *lines: str) -> Path:
    log = folder / "store.log"
    log.write_text("\n".join(lines))
    return log


def test_the_reason_of_a_process_is_preferred_to_its_last_log_line(tmp_path: Path) -> None:
    log = write(tmp_path, "store: model.path is empty", '{"event": "stopped"}', "")
    assert exit_reason(log, "store") == f"store: model.path is empty (log: {log})"


def test_without_a_reason_the_last_line_is_shown(tmp_path: Path) -> None:
    log = write(tmp_path, "store: of an earlier start", *["..."] * REASON_LINES, "killed")
    assert exit_reason(log, "store") == f"killed (log: {log})"
    assert exit_reason(tmp_path / "none.log", "store").startswith("no output")


def test_modules_of_the_working_directory_are_not_imported() -> None:
    assert environment(Config(), "engine")["PYTHONSAFEPATH"] == "1"
