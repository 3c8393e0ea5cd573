"""A bench that is ended by a signal stops every process that it started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHES = Path(__file__).resolve().parents[3] / "scripts" / "benches"
TIMEOUT_S = 60.0

SERVER = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

ThreadingHTTPServer(("127.0.0.1", {port}), Healthy).serve_forever()
"""

BENCH = """
import asyncio, runpy, sys, types
from pathlib import Path

benches, folder, port, server, how = sys.argv[1:]
sys.path.insert(0, benches)

def measure(arguments):
    from harness.engines import Engines, config_for
    from peers.process import PeerProcess

    folder_ = Path(folder)
    peer = PeerProcess([sys.executable, "-c", server], {}, folder_ / "peer.log", int(port))
    config = config_for(folder_, folder_ / "run", Path("/nowhere"), 1)
    with peer, Engines(folder_, config) as engines:
        engines.start("monitor", "router")
        print(peer._process.pid, *engines.pids().values(), flush=True)
        if how == "event loop":
            asyncio.run(asyncio.sleep(600))
        import time
        time.sleep(600)

sys.modules["chaos"] = types.SimpleNamespace(main=measure)
sys.argv = ["bench", "chaos"]
runpy.run_path(benches, run_name="__main__")
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("number", "how"),
    [(signal.SIGTERM, "event loop"), (signal.SIGTERM, "sleep"), (signal.SIGHUP, "sleep"), (signal.SIGKILL, "sleep")],
)
def test_a_bench_ended_by_a_signal_leaves_no_process(
    number: signal.Signals, how: str, tmp_path: Path, free_port: int
) -> None:
    command = [sys.executable, "-c", BENCH, str(BENCHES), str(tmp_path), str(free_port)]
    bench = subprocess.Popen(
        [*command, SERVER.format(port=free_port), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pids: list[int] = []
    try:
        assert bench.stdout is not None
        pids = list(map(int, bench.stdout.readline().split()))
        assert len(pids) == 3, bench.communicate()[1]
        assert all(map(is_alive, pids))
        bench.send_signal(number)
        errors = bench.communicate(timeout=TIMEOUT_S)[1]
        assert "Traceback" not in errors
        assert bench.returncode == (-number if number == signal.SIGKILL else 128 + number)
        deadline_s = time.monotonic() + TIMEOUT_S
        while any(map(is_alive, pids)) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert not [pid for pid in pids if is_alive(pid)]
    finally:
        for pid in [bench.pid, *pids]:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        bench.wait()
