"""The store process: answers messages about the registry and the slabs. Disk operations run in threads."""

import asyncio
import shlex
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from loraserve.bus.protocol import Bus, Envelope
from loraserve.clock import Clock
from loraserve.config import Config
from loraserve.device import resolve_device
from loraserve.errors import AdapterError, ConfigError, LoraServeError
from loraserve.messages import (
    AdapterList,
    AdapterRef,
    AdapterRegistered,
    AdapterUnregistered,
    ListAdapters,
    OpenSlab,
    ReadSlab,
    RegisterAdapter,
    RegistryChanged,
    SlabChunk,
    SlabInfo,
    ToStore,
    UnregisterAdapter,
)
from loraserve.model_shape import read_model_config, shape_from_config
from loraserve.service import Service
from loraserve.store.core import AdapterStore, StoreLimits

GARBAGE_INTERVAL_S = 60.0
WRITER_THREADS = 4

P = ParamSpec("P")
T = TypeVar("T")


class StoreService(Service):
    """Answers requests from any process, and publishes the registry on every change and periodically."""

    inbox = ToStore

    def __init__(self, config: Config, bus: Bus, clock: Clock) -> None:
        super().__init__(config, bus, clock)
        self._store: AdapterStore
        # Serializes changes to one name. Changes to different names run concurrently.
        self._name_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # Changes have their own threads, so that engines can read slabs while a slow disk delays changes.
        self._writers = ThreadPoolExecutor(WRITER_THREADS, thread_name_prefix="write")

    async def start(self, stack: AsyncExitStack) -> None:
        self._store = await asyncio.to_thread(open_store, self.config, self.clock.unix_s())
        stack.callback(self._store.close)
        stack.callback(self._writers.shutdown, wait=False, cancel_futures=True)
        for name in self._store.missing_slabs():
            self.log.error("slab_missing", adapter=name, remedy="register the adapter again")
        for name, path in self.config.store.adapters.items():
            await self._register_at_start(name, path)
        for name, source in self._store.outdated_adapters().items():
            remedy = "its slab has an earlier format; register the adapter again"
            self.log.error("slab_outdated", adapter=name, packed_from=source, remedy=remedy)

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        return [self._publish_periodically(), self._collect_garbage()]

    def ready_detail(self) -> str:
        return f"{len(self._store.registry.snapshot.records)} adapters"

    async def handle(self, envelope: Envelope) -> None:
        match envelope.message:
            case ListAdapters():
                snapshot = self._store.registry.snapshot
                self.bus.respond(envelope, AdapterList(revision=snapshot.revision, adapters=snapshot.refs()))
            case RegisterAdapter() as message:
                self.spawn(self._answer_register(envelope, message))
            case UnregisterAdapter(name=name):
                self.spawn(self._unregister(envelope, name))
            case OpenSlab(version=version):
                self.spawn(self._open(envelope, version))
            case ReadSlab() as message:
                self.spawn(self._read(envelope, message))

    async def _answer_register(self, envelope: Envelope, message: RegisterAdapter) -> None:
        ref, created = await self._register(message.name, message.path, message.replace)
        self.bus.respond(envelope, AdapterRegistered(adapter=ref, created=created))

    async def _register(self, name: str, path: str, replace: bool) -> tuple[AdapterRef, bool]:
        async with self._name_locks.setdefault(name, asyncio.Lock()):
            ref, created = await self._change(self._store.register, name, path, replace, self.clock.unix_s())
        self.log.info("registered", adapter=name, version=ref.version[:12], rank=ref.rank, created=created)
        self._tell(name, f"registered from {path} as version {ref.version}")
        self._tell(ref.version, f"registered as {name}, rank {ref.rank}, {ref.slab_bytes} bytes")
        self._publish()
        return ref, created

    async def _register_at_start(self, name: str, path: str) -> None:
        try:
            await self._register(name, path, replace=True)
        except AdapterError as error:
            self._tell(name, f"not registered: {error.message}")
            self.log.error("not_registered", adapter=name, code=error.code, reason=error.message)

    async def _unregister(self, envelope: Envelope, name: str) -> None:
        async with self._name_locks.setdefault(name, asyncio.Lock()):
            await self._change(self._store.unregister, name, self.clock.unix_s())
        self.log.info("unregistered", adapter=name)
        self._tell(name, "unregistered")
        self.bus.respond(envelope, AdapterUnregistered(name=name))
        self._publish()

    async def _open(self, envelope: Envelope, version: str) -> None:
        slab = await asyncio.to_thread(self._store.slabs.open, version, self.clock.unix_s())
        self.bus.respond(envelope, SlabInfo(version=version, slab_bytes=slab.slab_bytes), [slab.header])

    async def _read(self, envelope: Envelope, message: ReadSlab) -> None:
        version, offset, length = message.version, message.offset_bytes, message.length_bytes
        data = await asyncio.to_thread(self._store.slabs.read, version, offset, length, self.clock.unix_s())
        self.bus.respond(envelope, SlabChunk(version=version, offset_bytes=offset), [data])

    async def _change(self, function: Callable[P, T], *arguments: P.args, **_: P.kwargs) -> T:
        """Run a function that changes the disk in one of the threads for changes."""
        return await asyncio.get_running_loop().run_in_executor(self._writers, partial(function, *arguments))

    def _tell(self, subject: str, text: str) -> None:
        self.story.tell(subject, self.clock.monotonic_s(), text)

    def _publish(self) -> None:
        snapshot = self._store.registry.snapshot
        self.bus.publish("registry", RegistryChanged(revision=snapshot.revision, adapters=snapshot.refs()))

    async def _publish_periodically(self) -> None:
        while True:
            self._publish()
            await asyncio.sleep(self.config.store.publish_interval_s)

    async def _collect_garbage(self) -> None:
        while True:
            await asyncio.sleep(GARBAGE_INTERVAL_S)
            removed = await self._change(self._store.collect_garbage, self.clock.unix_s())
            for version in removed:
                self.log.info("slab_removed", version=version[:12])
                self._tell(version, "slab removed from disk: no name refers to it")


def open_store(config: Config, now: float) -> AdapterStore:
    """Open the configured model's store. Raises ConfigError for an unusable model, model name or data folder."""
    if not config.model.path:
        raise ConfigError("model.path is empty; name a Hugging Face model directory (scripts/up --model DIR)")
    model_dir = Path(config.model.path)
    limits = StoreLimits(
        served_model=config.model.name or model_dir.name,
        max_rank=config.store.max_rank,
        engine_max_rank=config.engine.max_rank,
        # A GPU engine computes its pool size at its start, and rejects requests for adapters that are too large.
        pool_bytes=config.engine.pool_bytes if resolve_device(config.engine.device) == "cpu" else None,
        allowed_dirs=config.store.allowed_dirs,
    )
    root = Path(config.cluster.data_dir or ".") / "store"
    try:
        shape = shape_from_config(read_model_config(model_dir))
        store = AdapterStore(root, shape, config.engine.slab_dtype, limits, now)
    except LoraServeError as error:
        raise ConfigError(str(error)) from error
    if limits.served_model in store.registry.snapshot.records:
        store.close()
        raise ConfigError(
            f"model.name {limits.served_model!r} is the name of a registered adapter; give the model another name "
            f"(--name), or start under another name once and unload the adapter (scripts/adapters unload "
            f"{shlex.quote(limits.served_model)})"
        )
    return store
