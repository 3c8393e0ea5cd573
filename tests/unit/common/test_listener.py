"""The listening socket: which one a gateway gets, and what an unusable port or descriptor tells the user."""

import os
import socket
import sys
from pathlib import Path

import pytest

from loraserve.config import Config, load_config
from loraserve.errors import ConfigError
from loraserve.listener import bind, open_listener


def configured(*settings: str) -> Config:
    return load_config(environ={}, overrides=settings)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_the_port_is_the_requested_one_or_a_free_one(host: str) -> None:
    with bind(host, 0) as chosen:
        port = chosen.getsockname()[1]
    assert port > 0
    with bind(host, port) as again:
        assert again.getsockname()[1] == port


def test_a_busy_port_is_named_with_both_remedies() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"gateway\.port {port}: it is in use.*--port N or --set gateway\.port"):
            bind("127.0.0.1", port)


def test_an_inherited_socket_replaces_host_and_port() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        copy = os.dup(bound.fileno())
        os.set_inheritable(copy, True)
        with open_listener(configured(f"gateway.listen_fd={copy}", "gateway.port=1")) as inherited:
            assert inherited.getsockname() == bound.getsockname()
            assert not inherited.get_inheritable()


def test_a_descriptor_that_is_no_socket_is_named(tmp_path: Path) -> None:
    with (
        (tmp_path / "file").open("w") as file,
        pytest.raises(ConfigError, match=r"gateway\.listen_fd \d+: .*no socket"),
    ):
        open_listener(configured(f"gateway.listen_fd={file.fileno()}"))
    with pytest.raises(ConfigError, match=r"gateway\.listen_fd 99999: .*no socket"):
        open_listener(configured("gateway.listen_fd=99999"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux distributes connections between such sockets")
def test_several_gateways_without_a_common_parent_bind_the_same_port() -> None:
    with bind("127.0.0.1", 0, shared=True) as first:
        port = first.getsockname()[1]
        first.listen()
        with open_listener(configured("cluster.gateways=2", f"gateway.port={port}")) as second:
            second.listen()
        with pytest.raises(ConfigError, match="in use"):
            open_listener(configured(f"gateway.port={port}"))


def test_another_platform_refuses_to_share_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(ConfigError, match=r"cluster\.gateways: only Linux.*scripts/up.*set cluster\.gateways to 1"):
        open_listener(configured("cluster.gateways=2", "gateway.port=0"))


def test_a_connection_waits_while_no_process_accepts() -> None:
    """The first process closes its copy of the socket, as a stopping gateway does. The second one serves the client."""
    with bind("127.0.0.1", 0) as shared:
        first = shared.dup()
        first.listen()
        first.close()
        with socket.create_connection(shared.getsockname(), timeout=5) as client:
            client.sendall(b"hello")
            with shared.dup() as second:
                second.listen()
                accepted, _ = second.accept()
                with accepted:
                    assert accepted.recv(5) == b"hello"
