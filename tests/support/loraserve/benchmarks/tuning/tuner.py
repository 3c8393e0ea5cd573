"""Measures block sizes on the device, one entry of the table after the other, and checks the best before it is kept."""

import math
import time
from typing import Any

from loraserve.benchmarks.lora.cases import LoraCase, floor_ms, module_bytes
from loraserve.benchmarks.lora.measure import Timer, WorldSettings
from loraserve.benchmarks.lora.report import say
from loraserve.benchmarks.lora.sides import TOLERANCE, Operands, Ours, World, largest_error
from loraserve.benchmarks.tuning.search import SKIPPED, Options, TuningTarget, cases_of, descend, options_of
from loraserve.kernels.lora.decode import decode
from loraserve.kernels.lora.expand import expand
from loraserve.kernels.lora.shrink import shrink
from loraserve.kernels.lora.tuning import DECODE_TOKENS, Blocks, TunedBlocks, default_blocks
from loraserve.model_shape import MODULES


class Tuner:
    """Searches block sizes. The best of a module's last target is a start of the search for its next one."""

    def __init__(self, timer: Timer, bytes_per_s: float, settings: WorldSettings) -> None:
        self._timer = timer
        self._bytes_per_s = bytes_per_s
        self._settings = settings
        self._world: World | None = None
        self._best: dict[tuple[int, bool], Blocks] = {}

    def tune(self, target: TuningTarget, deadline_s: float, options: Options | None = None) -> TunedBlocks | None:
        """Return the fastest sizes with right results that are found until ``deadline_s``, or None if none run.

        ``deadline_s`` is a time of ``time.monotonic``. The score is the time as a multiple of the floor, the geometric
        mean over the target's cases.
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
        say("  no sizes run: the defaults stay")
        return None

    def _score(
        self, world: World, target: TuningTarget, cases: list[tuple[LoraCase, Operands]], blocks: Blocks
    ) -> float:
        logs = []
        for case, operands in cases:
            forget_compiled()
            try:
                side = Ours(world, case, (blocks,) * len(MODULES))
                ms = self._timer.ms(lambda: _run_module(side, operands, world.shape.layers, target.module))  # noqa: B023
            except Exception as error:  # compilers raise many types of errors for sizes that do not fit
                say(f"  skipped, {type(error).__name__}: {blocks}")
                return SKIPPED
            if spills():
                say(f"  skipped, spills: {blocks}")
                return SKIPPED
            size = module_bytes(world.shape, MODULES[target.module], case) * world.shape.layers
            logs.append(math.log(ms / floor_ms(size, self._bytes_per_s)))
        return math.exp(sum(logs) / len(logs))

    def _is_right(self, world: World, target: TuningTarget, blocks: Blocks) -> bool:
        modules = range(target.module, target.module + 1)
        for case in cases_of(target):
            error = largest_error(Ours(world, case, (blocks,) * len(MODULES)), world, case, modules)
            if not error < TOLERANCE:
                say(f"  WRONG by {error:.2g} of the largest element at {case.name}, not used: {blocks}")
                return False
        return True

    def _entry(self, target: TuningTarget, blocks: Blocks, score: float) -> TunedBlocks:
        return TunedBlocks(
            k=target.k,
            widths=target.widths,
            tokens=target.tokens,
            rank=target.rank,
            blocks=blocks,
            floor_ratio=round(score, 3),
        )

    def _world_of(self, case: LoraCase) -> World:
        if self._world is None or self._world.ranks != case.ranks:
            self._world = None
            self._world = self._settings.make(case.ranks)
        return self._world


def _run_module(side: Ours, operands: Operands, layers: int, module: int) -> None:
    for layer in range(layers):
        side.add(operands.y[module], operands.x[module], layer, module)


def forget_compiled() -> None:
    """Drop the compiled kernels from memory. A launch loads its kernel again, from Triton's cache on disk if it can."""
    for kernel in (decode, shrink, expand):
        getattr(kernel, "device_caches", {}).clear()


def spills() -> int:
    """Return the registers spilled by the kernels launched since ``forget_compiled``; 0 in the interpreter."""
    caches: list[Any] = [
        cache for kernel in (decode, shrink, expand) for cache in getattr(kernel, "device_caches", {}).values()
    ]
    return sum(compiled.n_spills or 0 for compiled_of, *_ in caches for compiled in compiled_of.values())
