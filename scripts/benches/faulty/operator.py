"""Registers and removes adapters while a disk is faulty, and checks that nothing acknowledged is lost."""

import asyncio
import itertools
from functools import partial
from pathlib import Path

import aiohttp

from faulty.traffic import post
from loraserve.model_shape import ModelShape
from loraserve.testing.tiny_model import write_peft_adapter

PREPARED = 4
"""Adapters that are registered before the fault, to be removed during it."""
BETWEEN_S = 0.5
COMMAND_TIMEOUT_S = 6.0


_numbers = itertools.count()


class Operator:
    """Counts its commands. ``lost`` describes acknowledged commands that had no effect."""

    def __init__(self, http: aiohttp.ClientSession, folder: Path, shape: ModelShape) -> None:
        self.lost: list[str] = []
        self.loaded = self.refused = self.unloaded = self.not_unloaded = self.silent = 0
        self._http = http
        self._folder = folder
        self._shape = shape
        self._there: set[str] = set()
        self._unknown: set[str] = set()

    async def prepare(self) -> None:
        for _ in range(PREPARED):
            await self._load()

    async def work(self, seconds: float) -> None:
        """Remove and register adapters and ask for plans until the time is over."""
        ends_s = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < ends_s:
            if self._there:
                await self._unload(min(self._there))
            await self._load()
            await post(self._http, "/admin/rebalance", {}, COMMAND_TIMEOUT_S)
            await asyncio.sleep(BETWEEN_S)

    async def check_and_clean(self) -> None:
        """Compare the served models with the acknowledged commands, and remove the rest."""
        async with self._http.get("/v1/models") as response:
            served = {model["id"] for model in (await response.json())["data"]}
        mine = {name for name in served if name.startswith("operator-")} - self._unknown
        self.lost += [f"{name} was loaded and is gone" for name in sorted(self._there - mine)]
        self.lost += [f"{name} was unloaded and is served" for name in sorted(mine - self._there)]
        for name in sorted(name for name in served if name.startswith("operator-")):
            status, text = await post(self._http, "/v1/unload_lora_adapter", {"lora_name": name}, 30.0)
            if status != 200:
                self.lost.append(f"{name} is not unloaded after the fault: {status} {text[:200]}")

    def summary(self) -> str:
        return (
            f"loads: {self.loaded} done, {self.refused} refused; unloads: {self.unloaded} done, "
            f"{self.not_unloaded} refused; {self.silent} commands without an answer in time"
        )

    async def _load(self) -> None:
        number = next(_numbers)
        name = f"operator-{number}"
        # Each adapter has other weights, because equal ones would share a slab and need no space on the disk.
        write = partial(write_peft_adapter, self._folder / name, self._shape, 1, alpha=1, seed=number, strength=0.1)
        body = {"lora_name": name, "lora_path": str(await asyncio.to_thread(write))}
        status, _ = await post(self._http, "/v1/load_lora_adapter", body, COMMAND_TIMEOUT_S)
        if status == 200:
            self.loaded += 1
            self._there.add(name)
        elif status in (0, 503):
            self.silent += 1
            self._unknown.add(name)
        else:
            self.refused += 1

    async def _unload(self, name: str) -> None:
        status, _ = await post(self._http, "/v1/unload_lora_adapter", {"lora_name": name}, COMMAND_TIMEOUT_S)
        if status == 200:
            self.unloaded += 1
            self._there.discard(name)
        elif status in (0, 503):
            self.silent += 1
            self._there.discard(name)
            self._unknown.add(name)
        else:
            self.not_unloaded += 1
            self._there.discard(name)
            self._unknown.add(name)
