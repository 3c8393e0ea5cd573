"""One entry of a table after the other: sizes are tried on the device, and the best is checked before it is kept."""

import math
import time
from typing import Any

import msgspec
import torch

from loraserve.benchmarks.lora.cases import LAYERS, Case
from loraserve.benchmarks.lora.floor import milliseconds, module_bytes
from loraserve.benchmarks.lora.report import say
from loraserve.benchmarks.lora.search import SKIPPED, Options, Target, cases_of, descend, options_of
from loraserve.benchmarks.lora.sides import TOLERANCE, Ours, error
from loraserve.benchmarks.lora.timing import Timer
from loraserve.benchmarks.lora.world import Operands, World
from loraserve.kernels.lora.decode import decode
from loraserve.kernels.lora.expand import expand
from loraserve.kernels.lora.shrink import shrink
from loraserve.kernels.lora.tuning import DECODE_TOKENS, Blocks, TunedBlocks, default_blocks
from loraserve.model_shape import MODULES, ModelShape


class Tuner:
    """Keeps the adapters of the last rank bucket, and what was best for each module's last target."""

    def __init__(
        self,
        shape: ModelShape,
        timer: Timer,
        bytes_per_s: float,
        device: str = "cuda",
        layers: int = LAYERS,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._shape = msgspec.structs.replace(shape, layers=layers)
        self._timer = timer
        self._bytes_per_s = bytes_per_s
        self._device = device
        self._dtype = dtype
        self._world: World | None = None
        self._best: dict[tuple[int, bool], Blocks] = {}

    def tune(self, target: Target, deadline_s: float, options: Options | None = None) -> TunedBlocks | None:
        """The fastest right sizes found until ``deadline_s``, a time of ``time.monotonic``; None where none run.

        The score is the time as a multiple of the floor, the geometric mean over the target's cases.
        """
        world = self._world_of(cases_of(target)[0])
        cases = [(case, Operands(world, case)) for case in cases_of(target)]
        default = default_blocks(target.k, target.tokens)
        like = (target.module, target.tokens <= DECODE_TOKENS)
        tried = descend(
            [default, self._best.get(like, default)],
            options or options_of(target),
            target.k,
            lambda blocks: self._score(world, target, cases, blocks),
            lambda: time.monotonic() < deadline_s,
        )
        for blocks in sorted((b for b in tried if tried[b] < SKIPPED), key=lambda b: tried[b]):
            if self._is_right(world, target, blocks):
                self._best[like] = blocks
                say(f"  {len(tried)} tried: {tried[default]:.2f} of the floor, now {tried[blocks]:.2f}: {blocks}")
                return self._entry(target, blocks, tried[blocks])
        say("  nothing runs: the defaults stay")
        return None

    def _score(self, world: World, target: Target, cases: list[tuple[Case, Operands]], blocks: Blocks) -> float:
        logs = []
        for case, operands in cases:
            forget_compiled()
            try:
                side = Ours(world, case, (blocks,) * len(MODULES))
                ms = self._timer.ms(lambda: _run_module(side, operands, world.shape.layers, target.module))  # noqa: B023
            except Exception as problem:  # whatever a compiler says of sizes that do not fit
                say(f"  skipped, {type(problem).__name__}: {blocks}")
                return SKIPPED
            if spills():
                say(f"  skipped, spills: {blocks}")
                return SKIPPED
            size = module_bytes(world.shape, MODULES[target.module], case) * world.shape.layers
            logs.append(math.log(ms / milliseconds(size, self._bytes_per_s)))
        return math.exp(sum(logs) / len(logs))

    def _is_right(self, world: World, target: Target, blocks: Blocks) -> bool:
        modules = range(target.module, target.module + 1)
        for case in cases_of(target):
            off = error(Ours(world, case, (blocks,) * len(MODULES)), world, case, modules)
            if not off < TOLERANCE:
                say(f"  WRONG by {off:.2g} of the largest element at {case.name}, not used: {blocks}")
                return False
        return True

    def _entry(self, target: Target, blocks: Blocks, score: float) -> TunedBlocks:
        return TunedBlocks(
            k=target.k,
            widths=target.widths,
            tokens=target.tokens,
            rank=target.rank,
            blocks=blocks,
            floor_ratio=round(score, 3),
        )

    def _world_of(self, case: Case) -> World:
        if self._world is None or self._world.ranks != case.ranks:
            self._world = None
            self._world = World(self._shape, case.ranks, self._device, self._dtype)
        return self._world


def _run_module(side: Ours, operands: Operands, layers: int, module: int) -> None:
    for layer in range(layers):
        side.add(operands.y[module], operands.x[module], layer, module)


def forget_compiled() -> None:
    """From here on only what is launched is loaded again, from Triton's cache on disk where it is there."""
    for kernel in (decode, shrink, expand):
        getattr(kernel, "device_caches", {}).clear()


def spills() -> int:
    """Registers spilled by the kernels that were launched since ``forget_compiled``; 0 in the interpreter."""
    caches: list[Any] = [
        cache for kernel in (decode, shrink, expand) for cache in getattr(kernel, "device_caches", {}).values()
    ]
    return sum(compiled.n_spills or 0 for compiled_of, *_ in caches for compiled in compiled_of.values())
