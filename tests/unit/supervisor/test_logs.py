"""Log rotation: what is kept, what is dropped, and that writers need not reopen their files."""

import subprocess
import sys
from pathlib import Path

from loraserve.supervisor.logs import rotate_logs

LIMIT = 1000

WRITER = """
import sys

for line in sys.stdin:
    print(line.strip() * 1001, file=sys.stderr, flush=True)
    print(flush=True)
"""


def test_a_large_log_is_kept_once_and_a_small_one_is_left_alone(tmp_path: Path) -> None:
    large, small = tmp_path / "engine-0.log", tmp_path / "router.log"
    for generation in (b"a", b"b"):
        large.write_bytes(generation * (LIMIT + 1))
        small.write_bytes(b"s" * LIMIT)
        assert rotate_logs(tmp_path, LIMIT) == []
    assert large.read_bytes() == b""
    assert small.read_bytes() == b"s" * LIMIT
    assert (tmp_path / "engine-0.log.1").read_bytes() == b"b" * (LIMIT + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine-0.log", "engine-0.log.1", "router.log"]


def test_a_running_process_continues_at_the_start_of_the_emptied_file(tmp_path: Path) -> None:
    log = tmp_path / "store.log"
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True
        )
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        for letter in "ab":
            child.stdin.write(f"{letter}\n")
            child.stdin.flush()
            child.stdout.readline()
            if letter == "a":
                assert rotate_logs(tmp_path, LIMIT) == []
        child.stdin.close()
    # Without O_APPEND the file would begin with a hole of 1,002 zero bytes.
    assert log.read_text() == "b" * 1001 + "\n"
    assert (tmp_path / "store.log.1").read_text() == "a" * 1001 + "\n"


FULL_DISK = """
import resource, sys
from pathlib import Path
from loraserve.supervisor.logs import rotate_logs

resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # longer files cannot be written, as on a full disk
print(rotate_logs(Path(sys.argv[1]), 1000))
"""


def test_a_log_that_cannot_be_copied_does_not_grow_further(tmp_path: Path) -> None:
    log = tmp_path / "router.log"
    log.write_bytes(b"x" * (LIMIT + 1))
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert f"{log} was emptied without a copy (File too large)" in done.stdout
    assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [("router.log", 0)]
