"""The operators' commands against real sockets: missing gateways, refusals, progress, exit statuses."""

import io
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loraserve.ops.commands import main, store_path
from loraserve.ops.gateway_client import report_progress
from loraserve.testing.local_cluster import free_port


class Gateway(ThreadingHTTPServer):
    """A server that answers every request with ``status`` and ``body``, and records the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.body = 200, b"{}"
        self.asked: list[tuple[str, str, Any, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def refuse(self, status: int, message: str, code: str) -> None:
        self.status = status
        self.body = json.dumps({"error": {"message": message, "code": code}}).encode()


class Handler(BaseHTTPRequestHandler):
    server: Gateway

    def do_GET(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(content) if content else None
        self.server.asked.append((self.command, self.path, body, self.headers.get("Authorization", "")))
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Print no log lines into the output of the tests."""


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with Gateway() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["rebalance", "--dry-run"],
        ["drain", "engine-0"],
        ["undrain", "engine-0"],
        ["adapters"],
        ["adapters", "unload", "x"],
    ],
)
def test_no_gateway_is_one_line_with_the_remedy(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "Connection refused" in err
    assert "scripts/up" in err
    assert "--url" in err


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "nonsense", "http://127.0.0.1:x", "ftp://127.0.0.1"])
def test_an_invalid_url_is_reported(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", url]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert url in err
    assert "--url" in err


def test_another_server_on_the_port_is_reported(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.status, gateway.body = 404, b"<html>not here</html>"
    assert main(["status", "--url", gateway.url]) == 1
    assert "is it a LoRAServe gateway?" in capsys.readouterr().err


def test_a_server_that_does_not_speak_http_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"SSH-2.0-nobody\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert main(["status", "--url", f"http://127.0.0.1:{listener.getsockname()[1]}"]) == 1
        thread.join()
    assert capsys.readouterr().err.count("\n") == 1


def test_a_missing_key_and_a_wrong_key_name_the_flag(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.refuse(401, "Incorrect or missing API key", "invalid_api_key")
    assert main(["status", "--url", gateway.url]) == 1
    assert "it requires an API key; set --api-key or LORASERVE_API_KEY" in capsys.readouterr().err
    assert main(["status", "--url", gateway.url, "--api-key", "secret"]) == 1
    error = capsys.readouterr().err
    assert "not one of its keys" in error
    assert "secret" not in error
    assert [asked[3] for asked in gateway.asked] == ["", "Bearer secret"]


def test_the_environment_names_gateway_and_key(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASERVE_URL", gateway.url + "/")
    monkeypatch.setenv("LORASERVE_API_KEY", "from-environment")
    gateway.body = b'{"data": []}'
    assert main(["adapters"]) == 0
    assert main(["adapters", "list"]) == 0
    assert gateway.asked == [("GET", "/v1/models", None, "Bearer from-environment")] * 2


def test_flags_work_before_and_after_the_action(gateway: Gateway) -> None:
    gateway.body = b"Success"
    for command in (
        ["adapters", "--url", gateway.url, "--api-key", "k", "unload", "x"],
        ["adapters", "unload", "x", "--url", gateway.url, "--api-key", "k"],
    ):
        assert main(command) == 0
    assert gateway.asked == [("POST", "/v1/unload_lora_adapter", {"lora_name": "x"}, "Bearer k")] * 2


def test_load_sends_an_absolute_path_and_prints_the_answer(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.body = b"Success: LoRA adapter 'mine' added successfully."
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["adapters", "load", "mine", "./mine", "--replace", "--url", gateway.url]) == 0
    body = {"lora_name": "mine", "lora_path": str(tmp_path / "mine"), "load_inplace": True}
    assert gateway.asked == [("POST", "/v1/load_lora_adapter", body, "")]
    assert capsys.readouterr().out == gateway.body.decode() + "\n"
    # A folder that only the store has, in a container for instance.
    assert store_path("/adapters/support") == "/adapters/support"


def test_refusals_show_the_gateways_message(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.refuse(400, "The lora adapter 'x' cannot be loaded: no adapter_config.json", "bad_format")
    assert main(["adapters", "load", "x", "/nowhere", "--url", gateway.url]) == 1
    assert capsys.readouterr().err == "error: The lora adapter 'x' cannot be loaded: no adapter_config.json\n"
    gateway.refuse(400, "already loaded, set 'load_inplace' to True", "duplicate")
    assert main(["adapters", "load", "x", "/nowhere", "--url", gateway.url]) == 1
    assert "--replace" in capsys.readouterr().err


def test_json_output_is_the_gateways_answer_in_one_line(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    plan = {"type": "Plan", "epoch": 3, "created_unix_s": 0.0, "placements": []}
    answer = {"type": "RebalanceDone", "plan": plan, "moves": [], "applied": False, "failed": ["no engine is ready"]}
    gateway.body = json.dumps(answer, indent=2).encode()
    assert main(["rebalance", "--dry-run", "--json", "--url", gateway.url]) == 1
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == answer
    assert gateway.asked[0][2] == {"dry_run": True}


class Screen(io.StringIO):
    """A text buffer with an event that is set by the first write."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def write(self, text: str) -> int:
        count = super().write(text)
        self.written.set()
        return count


def test_progress_is_printed_only_for_slow_work() -> None:
    slow, quick = Screen(), Screen()
    with report_progress("planning", slow, interval_s=0.001):
        assert slow.written.wait(10)
    assert slow.getvalue().startswith("planning ... 0 s\n")
    with report_progress("planning", quick, interval_s=60):
        pass
    assert quick.getvalue() == ""


@pytest.mark.parametrize("name", ["status", "rebalance", "drain", "undrain", "adapters"])
def test_help_has_examples(name: str) -> None:
    command = [sys.executable, "-m", "loraserve.ops", name, "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"usage: scripts/{name}")
    assert "examples:" in shown
    assert all(flag in shown for flag in ("--url", "--api-key", "--json", "LORASERVE_URL", "LORASERVE_API_KEY"))


def test_a_closed_output_pipe_is_not_an_error(gateway: Gateway) -> None:
    gateway.body = json.dumps({"data": [{"id": f"{i:05}", "parent": "m"} for i in range(5000)]}).encode()
    command = f"{sys.executable} -m loraserve.ops adapters --url {gateway.url} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
