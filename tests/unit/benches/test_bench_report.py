"""The output that all benches share, and how benches are found."""

import json
import subprocess
import sys
from pathlib import Path

from harness.report import last_line, ratio, table

BENCHES = Path(__file__).resolve().parents[3] / "scripts" / "benches"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCHES), *arguments], capture_output=True, text=True)


def test_the_last_line_is_json_with_null_for_what_was_not_measured() -> None:
    line = last_line("engine", {"vs_peer": None, "vs_other": 1.5}, {"tok_s": 12.34567, "ttft_ms": None})
    assert "\n" not in line
    content = json.loads(line)
    assert list(content) == ["bench", "ratios", "figures", "machine", "commit"]
    assert content["ratios"] == {"vs_peer": None, "vs_other": 1.5}
    assert content["figures"] == {"tok_s": 12.35, "ttft_ms": None}
    assert "cores" in content["machine"]


def test_a_ratio_needs_both_sides() -> None:
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(3.0, None) is None
    assert ratio(None, 2.0) is None


def test_a_table_is_aligned_and_shows_what_is_missing() -> None:
    lines = table("title", ["", "ms"], [["first", 12.345], ["b", None]]).splitlines()
    assert lines == ["", "title", "         ms", "first  12.3", "b         -"]


def test_an_unknown_bench_is_refused_with_the_list() -> None:
    done = run("nothing")
    assert done.returncode == 2
    assert "no bench is called 'nothing'" in done.stderr
    assert "  engine " in done.stderr


def test_benches_have_help_and_are_listed() -> None:
    listed = run("--list").stdout
    assert "  engine " in listed
    assert "  forecast TRACE " in listed, "it cannot run without one"
    done = run("engine", "--help")
    assert done.returncode == 0
    assert "--quick" in done.stdout
