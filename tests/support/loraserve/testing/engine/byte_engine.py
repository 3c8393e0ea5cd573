"""An engine whose tokens are checksums of the adapter in its memory: wrong bytes give wrong tokens. Needs no torch.

Everything but the runner is the real engine, for tests of several engines where a model would take too long.
"""

import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loraserve.adapter.format import ITEM_BYTES, SlabHeader
from loraserve.bus.protocol import Bus
from loraserve.clock import Clock
from loraserve.config import Config
from loraserve.engine.compute.protocol import ComputedStep
from loraserve.engine.loading.memory import HostPool, check_slab
from loraserve.engine.schedule.events import Sampled, SequenceStep, StepBatch, StepResult
from loraserve.engine.service import EngineService
from loraserve.transfer.same_host import NAME_PREFIX, link_text
from loraserve.transfer.shm import SharedMemory

KV_TOKEN_BYTES = 64
Bytes = bytes | memoryview


def next_token(slab: Bytes, position: int, last: int) -> int:
    """Return the token after ``last``, which is at ``position``. ``slab`` is empty for the base model."""
    return zlib.crc32(struct.pack("<qq", position, last), zlib.crc32(slab))


def generated(slab: Bytes, prompt: Sequence[int], count: int) -> list[int]:
    """Return the tokens that the engine must generate."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(slab, len(tokens) - 1, tokens[-1]))
    return tokens[len(prompt) :]


def pool_of(pid: int) -> NDArray[np.uint8]:
    """Map the pool of an engine in another process: what is written here, that engine reads."""
    begins = link_text(NAME_PREFIX).split()[0]
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if os.readlink(path).startswith(begins):
                with path.open("r+b") as memory:
                    return np.frombuffer(mmap.mmap(memory.fileno(), 0), np.uint8)
    raise LookupError(f"process {pid} has no pool")


class ByteRunner:
    """A Runner that computes checksums. Its pool lies in shared memory, as that of every host engine."""

    steps_ahead = 0
    max_positions = 4096
    eos_token_ids: tuple[int, ...] = ()
    weights_backend = "no"

    def __init__(self, config: Config) -> None:
        engine = config.engine
        self.kv_blocks = engine.kv_bytes // (engine.block_tokens * KV_TOKEN_BYTES)
        self._dtype = engine.slab_dtype
        memory = SharedMemory(engine.pool_bytes)
        self.pool = HostPool(memory.view, memory)
        self._slabs: dict[int, range] = {}

    def install(self, slot: int, header: SlabHeader, base_elements: int) -> None:
        item_bytes = ITEM_BYTES[self._dtype]
        check_slab(header, self._dtype, base_elements, len(self.pool) // item_bytes)
        start = base_elements * item_bytes
        self._slabs[slot] = range(start, start + header.slab_bytes)

    def remove(self, slot: int) -> None:
        self._slabs.pop(slot, None)

    def submit(self, batch: StepBatch) -> ComputedStep:
        started_s = time.monotonic()
        sampled = tuple(self._sampled(batch.sequences))
        return ComputedStep(StepResult(step_id=batch.step_id, sampled=sampled, duration_s=time.monotonic() - started_s))

    def _sampled(self, sequences: Sequence[SequenceStep]) -> Iterator[Sampled]:
        for sequence in sequences:
            if sequence.sample:
                position = sequence.start + len(sequence.tokens) - 1
                token = next_token(self._slab(sequence.slot), position, sequence.tokens[-1])
                yield Sampled(request_id=sequence.request_id, token=token)

    def _slab(self, slot: int) -> Bytes:
        # A real engine computes with what lies in the pool now, not with what was verified at the load.
        if slot < 0:
            return b""
        where = self._slabs[slot]
        return self.pool.view(where.start, len(where))


class ByteEngine(EngineService):
    """The engine's service with a ByteRunner."""

    def __init__(self, config: Config, bus: Bus, clock: Clock) -> None:
        super().__init__(config, bus, clock, build=_build)


def _build(config: Config, progress: Callable[[str], None]) -> ByteRunner:
    return ByteRunner(config)
