"""The addresses of processes, the private run directory, and the lock on a process name."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from loraserve.bus.addresses import Addresses, NameClaim, make_private_dir, resolve_addresses, run_dir
from loraserve.config import BusConfig, ClusterConfig, Config
from loraserve.errors import ConfigError


def on_tcp(**changes: object) -> Config:
    templates = {"connect": "tcp://{name}:5570", "connect_pub": "tcp://{name}:5571"}
    return Config(bus=BusConfig(**{**templates, **changes}))  # type: ignore[arg-type]


def test_by_default_a_process_has_two_sockets_in_the_run_dir() -> None:
    found = resolve_addresses(Config(cluster=ClusterConfig(run_dir="/run/x")), "engine-0")
    inbox, publications = "ipc:///run/x/engine-0.sock", "ipc:///run/x/engine-0.pub"
    assert found == Addresses(inbox, publications, inbox, publications)
    assert found.on_this_machine


def test_tcp_bind_addresses_may_differ_from_connect_addresses() -> None:
    config = on_tcp(bind="tcp://0.0.0.0:5570", bind_pub="tcp://*:5571")
    found = resolve_addresses(config, "router")
    assert found == Addresses("tcp://router:5570", "tcp://router:5571", "tcp://0.0.0.0:5570", "tcp://*:5571")
    assert not found.on_this_machine


def test_bus_peers_overrides_the_addresses_of_one_peer() -> None:
    config = on_tcp(peers={"engine-1": "tcp://[fd00::7]:70, tcp://[fd00::7]:71"})
    assert resolve_addresses(config, "engine-1").inbox == "tcp://[fd00::7]:70"
    assert resolve_addresses(config, "engine-1").publications == "tcp://[fd00::7]:71"
    assert resolve_addresses(config, "engine-0").inbox == "tcp://engine-0:5570"


def test_the_default_run_dir_contains_the_user_id(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_dir(Config()).name == f"loraserve-{os.getuid()}"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(cluster=ClusterConfig(run_dir="/" + "x" * 95)), "set cluster.run_dir to a shorter folder"),
        (Config(cluster=ClusterConfig(run_dir="run")), "set cluster.run_dir to an absolute folder"),
        (on_tcp(connect="udp://{name}:1"), "bus.connect: 'udp://a:1' is neither"),
        (on_tcp(connect="tcp://{name}"), "is neither"),
        (on_tcp(connect="tcp://:1"), "is neither"),
        (on_tcp(bind_pub="tcp://{name}:x"), "bus.bind_pub"),
        (on_tcp(peers={"a": "tcp://x:1"}), "bus.peers.a: write 'inbox address,publications address'"),
        (on_tcp(connect="tcp://x:1", connect_pub="tcp://x:1"), "give each its own"),
    ],
)
def test_errors_for_invalid_addresses_name_the_field(config: Config, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve_addresses(config, "a")
    assert words in str(refused.value)


def test_the_run_dir_is_private(tmp_path: Path) -> None:
    made = make_private_dir(tmp_path / "a" / "b")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert make_private_dir(made) == made


def test_a_run_dir_that_other_users_can_access_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match=r"mode 0755.*run: chmod 700"):
        make_private_dir(tmp_path / "open")


def test_a_run_dir_that_is_a_link_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(make_private_dir(tmp_path / "real"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not a folder"):
        make_private_dir(tmp_path / "link")
    with pytest.raises(ConfigError, match=r"cluster\.run_dir .*file"):
        make_private_dir(tmp_path / "file")


def test_a_run_dir_of_another_user_is_refused(tmp_path: Path) -> None:
    theirs = Path("/")
    if os.getuid() == 0:
        theirs = make_private_dir(tmp_path / "theirs")
        os.chown(theirs, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user id"):
        make_private_dir(theirs)


def test_a_name_is_claimed_once_and_free_after_release(tmp_path: Path) -> None:
    folder = make_private_dir(tmp_path / "run")
    words = f"a process named a already runs in .*pid {os.getpid()}"
    with NameClaim(folder, "a"), NameClaim(folder, "b"), pytest.raises(ConfigError, match=words):
        NameClaim(folder, "a")
    with NameClaim(folder, "a") as claim:
        claim.release()
        claim.release()


def test_the_kernel_releases_the_claim_of_a_killed_process(tmp_path: Path) -> None:
    folder = make_private_dir(tmp_path / "run")
    code = (
        "import os, signal, sys; from pathlib import Path; from loraserve.bus.addresses import NameClaim;"
        "claim = NameClaim(Path(sys.argv[1]), 'a'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == -9
    assert (folder / "a.lock").exists()
    with NameClaim(folder, "a"):
        assert (folder / "a.lock").read_text() == str(os.getpid())
