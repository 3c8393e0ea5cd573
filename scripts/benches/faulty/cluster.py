"""A local cluster whose processes can be disturbed."""

import asyncio
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from harness.report import BenchError

from faulty.cells import Cell, Fault
from loraserve.config import load_config
from loraserve.errors import LoraServeError
from loraserve.ping import ping
from loraserve.supervisor.state import CONFIG_NAME
from loraserve.testing.faults.interpreter import write_interpreter
from loraserve.testing.faults.shim import Shim
from loraserve.testing.local_cluster import LocalCluster

DISK_DELAY_S = 0.3
"""Each read, write and flush of a slow disk takes this much longer."""
CLOCK_STEP_S = 3600.0
SHARE_LOST, SHARE_DOUBLED, SHARE_OVERTAKEN = 0.05, 0.2, 0.2
POLL_S = 0.2
READY_TIMEOUT_S = 150.0
ADMIN_TIMEOUT_S = 3.0


class FaultyCluster(LocalCluster):
    """A cluster of two engines. ``names`` are its processes in starting order."""

    def __init__(
        self, folder: Path, model: Path, adapters: Mapping[str, Path], names: Sequence[str], settings: Sequence[str]
    ) -> None:
        data_dir = folder / "data"
        flags = ["--model", str(model), *(f"--set={setting}" for setting in settings)]
        super().__init__(data_dir, *flags, adapters=adapters)
        self.names = list(names)
        self._interpreter, self._faults = write_interpreter(folder / "faults", data_dir, names)

    def command(self, name: str, *flags: str) -> list[str]:
        return [str(self._interpreter), *super().command(name, *flags)[1:]]

    def session(self) -> aiohttp.ClientSession:
        """Return a session that opens a connection for each request, so that requests spread over the gateways."""
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        return aiohttp.ClientSession(self.url, connector=connector, timeout=aiohttp.ClientTimeout(total=None))

    async def disturb(self, cell: Cell) -> None:
        """Begin the fault of a cell, hold it for ``cell.seconds`` and end it."""
        try:
            await self._begin(cell)
        finally:
            self._end(cell)

    async def wait_ready(self, http: aiohttp.ClientSession) -> float:
        """Wait until all processes answer, are ready and know each other. Returns when it was first seen.

        Raises BenchError after ``READY_TIMEOUT_S``.
        """
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        why = "no answer"
        while time.monotonic() < deadline_s:
            try:
                async with http.get("/admin/cluster", timeout=aiohttp.ClientTimeout(total=ADMIN_TIMEOUT_S)) as answer:
                    why = self._what_is_missing(await answer.json())
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                why = f"the gateway: {error or type(error).__name__}"
            if not why:
                why = await self._what_gateways_lack()
            if not why:
                return time.monotonic()
            await asyncio.sleep(POLL_S)
        raise BenchError(f"the cluster is not ready {READY_TIMEOUT_S:.0f} s after a fault: {why}")

    def _what_is_missing(self, state: Mapping[str, Any]) -> str:
        """Return what the cluster waits for, or "" if it is complete."""
        states = {name: process["state"] for name, process in state["processes"].items()}
        for name in self.names:
            if name in states and states[name] != "READY":
                return f"{name} is {states[name]}"
        engines = {engine["name"]: engine for engine in state["engines"]}
        for name in (name for name in self.names if name.startswith("engine-")):
            if name not in engines or not engines[name]["alive"] or engines[name]["load"]["state"] != "READY":
                return f"{name} does not report"
        return "" if set(self.names) <= self.pids().keys() else "a process is not running"

    async def _what_gateways_lack(self) -> str:
        """Return which gateway does not answer, or "". A request over HTTP is answered by any of them."""
        config = load_config(self.data_dir / "run" / CONFIG_NAME)
        for name in (name for name in self.names if name.startswith("gateway-")):
            try:
                pong = await ping(config, name, ADMIN_TIMEOUT_S)
            except LoraServeError as error:
                return f"{name}: {error}"
            if pong.state != "READY":
                return f"{name} is {pong.state}"
        return ""

    async def _begin(self, cell: Cell) -> None:
        match cell.fault:
            case Fault.KILL | Fault.TERM:
                number = signal.SIGKILL if cell.fault is Fault.KILL else signal.SIGTERM
                pids = self.pids()
                for name in cell.targets:
                    os.kill(pids[name], number)
                await self._wait_ended([pids[name] for name in cell.targets])
            case Fault.STOP:
                self._signal_all(cell, signal.SIGSTOP)
                await asyncio.sleep(cell.seconds)
            case Fault.CLOCK:
                for step_s in (CLOCK_STEP_S, -CLOCK_STEP_S):
                    for faults in self._faults_of(cell):
                        faults.step_clock(step_s)
                    await asyncio.sleep(cell.seconds / 2)
            case _:
                for faults in self._faults_of(cell):
                    _set_fault(faults, cell)
                for name in cell.others:
                    self._faults[name].cut_off(*cell.targets)
                await asyncio.sleep(cell.seconds)

    def _end(self, cell: Cell) -> None:
        if cell.fault is Fault.STOP:
            self._signal_all(cell, signal.SIGCONT)
        for faults in self._faults.values():
            faults.heal()

    async def _wait_ended(self, pids: Sequence[int]) -> None:
        while any(Path(f"/proc/{pid}/stat").exists() for pid in pids):  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.01)

    def _signal_all(self, cell: Cell, number: signal.Signals) -> None:
        pids = self.pids()
        for name in cell.targets:
            os.kill(pids[name], number)

    def _faults_of(self, cell: Cell) -> list[Shim]:
        return [self._faults[name] for name in cell.targets]


def _set_fault(faults: Shim, cell: Cell) -> None:
    match cell.fault:
        case Fault.SLOW_DISK:
            faults.delay_disk(DISK_DELAY_S)
        case Fault.STUCK_DISK:
            faults.block_disk(True)
        case Fault.FULL_DISK:
            faults.limit_disk(0)
        case Fault.LOSS:
            faults.disturb_messages(lost=SHARE_LOST)
        case Fault.DOUBLE:
            faults.disturb_messages(doubled=SHARE_DOUBLED)
        case Fault.REORDER:
            faults.disturb_messages(delayed=SHARE_OVERTAKEN)
        case Fault.PARTITION:
            faults.cut_off(*cell.others)
