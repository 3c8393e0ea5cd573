"""The gateway as a real process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

START_S = 60.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def start(model_dir: Path, run_dir: Path, port: int, name: str = "gateway-0") -> "subprocess.Popen[str]":
    settings = (f"model.path={model_dir}", f"cluster.run_dir={run_dir}", f"gateway.port={port}")
    flags = [flag for setting in settings for flag in ("--set", setting)]
    command = [sys.executable, "-m", "loraserve.gateway", "--name", name, *flags]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LORASERVE_")}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def ask(url: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def wait_up(process: "subprocess.Popen[str]", url: str) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            assert ask(f"{url}/live")[0] == 200
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"the gateway did not come up, exit status {process.poll()}")


@pytest.mark.cluster
def test_a_gateway_serves_prevents_a_second_one_and_stops(model_dir: Path, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    first = start(model_dir, run_dir, port)
    try:
        wait_up(first, url)
        assert ask(f"{url}/tokenize", {"messages": [{"role": "user", "content": "hi"}]})[1]["count"] > 5
        status, health = ask(f"{url}/health")
        assert (status, health["router"]) == (503, "UNREACHABLE")
        second = start(model_dir, run_dir, port, "gateway-1")
        _, errors = second.communicate(timeout=START_S)
        assert second.returncode == 2
        assert f"gateway.port {port}: it is in use" in errors
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=15) == 0
    finally:
        first.kill()
        first.communicate()
