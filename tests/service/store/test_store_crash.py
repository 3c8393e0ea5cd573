"""A store that is killed and a store with a full disk, each as a real process.

The tests simulate a full disk by a limit on the size of files, because both end a write half-way.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loraserve.config import to_toml
from loraserve.messages import AdapterRef

Opened = Callable[..., AbstractAsyncContextManager[Any]]
Peft = Callable[..., Path]
StartStore = Callable[..., "subprocess.Popen[str]"]
TIMEOUT_S = 30.0

SCRIPT = """
# Each input line is JSON: name, path and file-size limit. The script registers the adapter and prints the answer.
import asyncio, json, resource, signal, sys
from pathlib import Path
from loraserve.config import load_config
from loraserve.errors import PeerError
from loraserve.messages import AdapterRegistered, Ping, RegisterAdapter
from loraserve.service import ServiceState
from loraserve.store.service import StoreService
from loraserve.clock import SystemClock
from loraserve.testing.memory_bus import MemoryNetwork


async def register(client, name, path, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit or resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        answer = await client.request("store", RegisterAdapter(name=name, path=path), AdapterRegistered, 30.0)
    except PeerError as error:
        return {"code": error.code, "message": error.message}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {"version": answer.adapter.version, "created": answer.created}


async def main():
    if sys.argv[2] == "die at the limit":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    network = MemoryNetwork()
    store = StoreService(load_config(Path(sys.argv[1])), network.bus("store", StoreService.inbox), SystemClock())
    serving = asyncio.create_task(store.run())
    client = network.bus("client", Ping)
    while store.state is not ServiceState.READY:
        await asyncio.sleep(0.01)
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await register(client, *json.loads(line))), flush=True)
    store.stop()
    await serving

asyncio.run(main())
"""


@pytest.fixture
def start_store(tmp_path: Path, helpers: SimpleNamespace) -> Iterator[StartStore]:
    """Return a function that starts a store process in the folder of this test."""
    started: list[subprocess.Popen[str]] = []
    (tmp_path / "store.py").write_text(SCRIPT)
    (tmp_path / "store.toml").write_text(to_toml(helpers.store_config(tmp_path)))

    def start(mode: str = "") -> "subprocess.Popen[str]":
        command = [sys.executable, str(tmp_path / "store.py"), str(tmp_path / "store.toml"), mode]
        with (tmp_path / "store.log").open("a") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1
            )
        started.append(process)
        while (line := next_line(process)) != "ready":
            assert line, (tmp_path / "store.log").read_text()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def next_line(process: "subprocess.Popen[str]") -> str:
    """Return the next line of output, which may be a log line."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ask(process: "subprocess.Popen[str]", name: str, path: Path, limit: int = 0) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps([name, str(path), limit]) + "\n")


def answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
    while not (line := next_line(process)).startswith("{"):
        assert line, "the store ended"
    content: dict[str, Any] = json.loads(line)
    return content


def wait_for_file(folder: Path) -> None:
    """Wait until the folder contains a file."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not os.listdir(folder):
        assert time.monotonic() < deadline_s, f"nothing new appears in {folder}"


def files(folder: Path) -> dict[str, int]:
    """Return the sizes of all files under the folder by path."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def is_sound(opened: Opened, acknowledged: dict[str, str]) -> dict[str, str]:
    """Open the store again and check that all acknowledged adapters are present and intact."""

    async def main() -> dict[str, str]:
        async with opened() as stage:
            names: dict[str, str] = await stage.names()
            assert acknowledged.items() <= names.items()
            for name, version in names.items():
                assert await stage.is_whole(AdapterRef(name=name, version=version, rank=0, slab_bytes=0)), name
            return names

    return asyncio.run(main())


def test_a_full_disk_refuses_with_the_remedy_and_leaves_nothing_half_written(
    start_store: StartStore, opened: Opened, peft: Peft, tmp_path: Path, helpers: SimpleNamespace
) -> None:
    process = start_store()
    ask(process, "small", peft(0, rank=1))
    small = answer(process)
    slabs = files(helpers.store_folder(tmp_path) / "slabs")
    ask(process, "large", peft(1, rank=32), limit=100_000)
    refused = answer(process)
    assert refused["code"] == "disk_full"
    assert "free space under cluster.data_dir and try again" in refused["message"]
    assert files(helpers.store_folder(tmp_path) / "slabs") == slabs
    assert files(helpers.store_folder(tmp_path) / "tmp") == {}
    ask(process, "large", peft(1, rank=32))
    large = answer(process)
    assert large["created"], "once there is room it goes on without a restart"
    process.communicate()
    assert is_sound(opened, {}) == {"small": small["version"], "large": large["version"]}


def test_a_name_is_not_registered_if_only_the_database_cannot_grow(
    start_store: StartStore, opened: Opened, peft: Peft, tmp_path: Path, helpers: SimpleNamespace
) -> None:
    process = start_store()
    ask(process, "first", peft(0, rank=1))
    first = answer(process)
    # The slab is already stored under another name, so that only the database has to grow.
    log = next(helpers.store_folder(tmp_path).glob("registry.sqlite-wal"))
    ask(process, "second", peft(0, rank=1), limit=log.stat().st_size)
    refused = answer(process)
    assert refused["code"] in ("disk_full", "storage")
    assert "adapter 'second'" in refused["message"]
    ask(process, "third", peft(0, rank=1))
    assert answer(process)["created"], "the registry goes on where it was"
    process.kill()
    process.wait()
    assert is_sound(opened, {}) == dict.fromkeys(("first", "third"), first["version"])


def test_a_store_that_was_killed_while_writing_a_slab_starts_without_it(
    start_store: StartStore, opened: Opened, peft: Peft, tmp_path: Path, helpers: SimpleNamespace
) -> None:
    """Like SIGKILL, the default action of the limit's signal ends the process at once, but at a known byte."""
    process = start_store("die at the limit")
    ask(process, "first", peft(0, rank=1))
    first = answer(process)["version"]
    ask(process, "second", peft(1, rank=32), limit=100_000)
    assert process.wait(TIMEOUT_S) == -signal.SIGXFSZ
    folder = helpers.store_folder(tmp_path)
    assert list(files(folder / "tmp").values()) == [100_000], "it was half-written"
    assert is_sound(opened, {}) == {"first": first}
    assert files(folder / "tmp") == {}
    assert len(files(folder / "slabs")) == 1


@pytest.mark.parametrize("answers", [0, 1, 3])
def test_a_store_killed_at_any_moment_keeps_acknowledged_registrations(
    start_store: StartStore, opened: Opened, peft: Peft, tmp_path: Path, helpers: SimpleNamespace, answers: int
) -> None:
    process = start_store()
    names = ["one", "two", "three", "four"]
    for seed, name in enumerate(names):
        ask(process, name, peft(seed))
    acknowledged = {name: answer(process)["version"] for name in names[:answers]}
    wait_for_file(helpers.store_folder(tmp_path) / "slabs")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert is_sound(opened, acknowledged).keys() <= set(names)
    process = start_store()
    for seed, name in enumerate(names):
        ask(process, name, peft(seed))
    again = {name: answer(process)["version"] for name in names}
    process.communicate()
    assert is_sound(opened, {}) == again
    assert acknowledged.items() <= again.items()
