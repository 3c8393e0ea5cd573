"""A store service on the in-memory bus, a client, and PEFT directories."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loraserve.adapter.format import decode_header, seal_layout, slab_version
from loraserve.clock import SystemClock
from loraserve.config import ClusterConfig, Config, EngineConfig, ModelConfig, StoreConfig
from loraserve.messages import (
    AdapterList,
    AdapterRef,
    AdapterRegistered,
    ListAdapters,
    OpenSlab,
    ReadSlab,
    RegisterAdapter,
    RegistryChanged,
    SlabChunk,
    SlabInfo,
    ToGateway,
)
from loraserve.model_shape import ModelShape
from loraserve.service import ServiceState
from loraserve.store.service import StoreService
from loraserve.testing.memory_bus import MemoryNetwork
from loraserve.testing.peft_writer import named_tensors, random_pairs, write_peft

SHAPE = ModelShape(layers=4, hidden=128, heads=4, kv_heads=2, head_dim=32, ffn=256, vocab=64)
MODEL = {
    "model_type": "llama",
    "num_hidden_layers": SHAPE.layers,
    "hidden_size": SHAPE.hidden,
    "num_attention_heads": SHAPE.heads,
    "num_key_value_heads": SHAPE.kv_heads,
    "head_dim": SHAPE.head_dim,
    "intermediate_size": SHAPE.ffn,
    "vocab_size": SHAPE.vocab,
}
TIMEOUT_S = 20.0


def write_adapter(folder: Path, seed: int = 0, rank: int = 8) -> Path:
    return write_peft(folder, named_tensors(random_pairs(SHAPE, rank, seed)), r=rank)


def store_config(root: Path, **store: Any) -> Config:
    """Return the configuration of a store for a model named "base", with all data under ``root``."""
    (root / "base").mkdir(parents=True, exist_ok=True)
    (root / "base" / "config.json").write_text(json.dumps(MODEL))
    return Config(
        cluster=ClusterConfig(data_dir=str(root / "data")),
        model=ModelConfig(path=str(root / "base")),
        engine=EngineConfig(pool_bytes=2 << 20),
        store=StoreConfig(**{"publish_interval_s": 3600.0, **store}),
    )


def store_folder(root: Path) -> Path:
    """Return the folder with the model's slabs."""
    (folder,) = (root / "data" / "store").iterdir()
    return folder


class Stage:
    """A running store and its clients. ``news`` are its publications."""

    def __init__(self, config: Config, network: MemoryNetwork) -> None:
        self.store = StoreService(config, network.bus("store", StoreService.inbox), SystemClock())
        self.client = network.bus("gateway-0", ToGateway)
        self.client.subscribe("store", "registry")
        self.news: list[RegistryChanged] = []

    async def ask(self, message: Any, kind: type[Any]) -> Any:
        return await self.client.request("store", message, kind, TIMEOUT_S)

    async def register(self, name: str, path: Path | str, replace: bool = False) -> AdapterRegistered:
        message = RegisterAdapter(name=name, path=str(path), replace=replace)
        answer: AdapterRegistered = await self.ask(message, AdapterRegistered)
        return answer

    async def names(self) -> dict[str, str]:
        """Return the registered versions by name."""
        listed: AdapterList = await self.ask(ListAdapters(), AdapterList)
        return {adapter.name: adapter.version for adapter in listed.adapters}

    async def fetch(self, adapter: AdapterRef, chunk_bytes: int = 1 << 20) -> tuple[bytes, bytes]:
        """Read a slab in chunks, as an engine does, and return header and slab."""
        info, (header,) = await self.client.request_frames(
            "store", OpenSlab(version=adapter.version), SlabInfo, TIMEOUT_S
        )
        chunks = []
        for start in range(0, info.slab_bytes, chunk_bytes):
            length = min(chunk_bytes, info.slab_bytes - start)
            message = ReadSlab(version=adapter.version, offset_bytes=start, length_bytes=length)
            _, (data,) = await self.client.request_frames("store", message, SlabChunk, TIMEOUT_S)
            chunks.append(bytes(data))
        return bytes(header), b"".join(chunks)

    async def is_whole(self, adapter: AdapterRef) -> bool:
        header, slab = await self.fetch(adapter)
        return slab_version(seal_layout(decode_header(header), slab)) == adapter.version

    async def hear(self) -> None:
        while True:
            self.news.append((await self.client.receive()).message)


@asynccontextmanager
async def open_stage(config: Config) -> AsyncIterator[Stage]:
    """Run the store within the block. Raises the error that ended it."""
    stage = Stage(config, MemoryNetwork())
    serving = asyncio.create_task(stage.store.run())
    hearing = asyncio.create_task(stage.hear())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while stage.store.state is not ServiceState.READY and not serving.done():  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        yield stage
    finally:
        hearing.cancel()
        stage.store.stop()
        await serving


@pytest.fixture
def peft(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a PEFT directory for a seed and rank."""
    return lambda seed=0, rank=8: write_adapter(tmp_path / f"peft-{seed}-{rank}", seed, rank)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., AbstractAsyncContextManager[Stage]]:
    """Return a function that runs a store in this test's folder for a block. A second block is a restart."""
    return lambda **store: open_stage(store_config(tmp_path, **store))


@pytest.fixture
def helpers() -> SimpleNamespace:
    return SimpleNamespace(store_config=store_config, store_folder=store_folder, shape=SHAPE)
