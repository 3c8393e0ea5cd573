"""Measures case after case on a CUDA GPU: first the check against the definition, then the time.

Times are those of replayed CUDA graphs, so that no launch is waited for. Peers get a search over their block sizes.
"""

import gc
import statistics
from collections.abc import Callable
from typing import Protocol

import msgspec
import torch

from loraserve.benchmarks.lora.cases import LAYERS, LLAMA_3_8B, OURS, LoraCase, floor_ms, layer_bytes
from loraserve.benchmarks.lora.report import say
from loraserve.benchmarks.lora.sides import (
    PEER_TOLERANCE,
    TOLERANCE,
    Operands,
    Ours,
    Side,
    World,
    largest_error,
    run_layers,
)
from loraserve.model_shape import MODULES, ModelShape

COPY_BYTES = 2 << 30
FLUSH_BYTES = 256 << 20
"""More than any L2 cache holds."""
MIN_REPLAYS, MAX_REPLAYS = 5, 200
WARM_UPS = 3
QUICK_OPTIONS = 2
"""Options of each knob that a quick run tries, the default among them."""

Make = Callable[[World, LoraCase], Side]


class Timer(Protocol):
    """Measures steps. Raises what a step raises if it does not compile or does not fit."""

    def ms(self, step: Callable[[], None]) -> float:
        """Return the milliseconds of one ``step``."""


class GraphTimer:
    """Takes the median of graph replays for about ``seconds``, each with a cold L2 cache.

    With a cold cache a step reads from memory whatever it needs, however little that is. The few microseconds of a
    replay's start are part of the time; steps of many layers make that part small.
    """

    def __init__(self, seconds: float = 0.15) -> None:
        self._seconds = seconds
        self._flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")
        self._sum = torch.zeros((), dtype=torch.float32, device="cuda")

    def ms(self, step: Callable[[], None]) -> float:
        graph = capture(step)
        once_ms = statistics.median(self._replays_ms(graph, MIN_REPLAYS))
        count = round(1e3 * self._seconds / max(once_ms, 1e-3))
        return statistics.median(self._replays_ms(graph, min(MAX_REPLAYS, max(MIN_REPLAYS, count))))

    def _replays_ms(self, graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
        spans = []
        for _ in range(count):
            # Flush the cache by reads: written lines would be written back during the step.
            torch.sum(self._flush, dim=0, out=self._sum)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            spans.append((begin, end))
        torch.cuda.synchronize()
        return [float(begin.elapsed_time(end)) for begin, end in spans]


def capture(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Return the step as a graph, after runs that compile and allocate what it needs."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def copy_bytes_per_s(timer: Timer, size_bytes: int = COPY_BYTES) -> float:
    """Return the bytes that a copy within the device's memory reads and writes per second; the best of three."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device="cuda").zero_()
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * size_bytes / (min(timer.ms(copy) for _ in range(3)) / 1e3)


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one side at one case: milliseconds per layer, beside the memory floor."""

    case: str
    side: str
    ms: float
    floor_ms: float
    error: float
    untuned_ms: float

    @property
    def ratio(self) -> float:
        return self.ms / self.floor_ms


class WrongResultError(Exception):
    """The results of a side differ from the definition, so that its time means nothing."""


class WorldSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The device, model shape and dtype that a benchmark runs with; ``layers`` of the model are made."""

    device: str = "cuda"
    shape: ModelShape = LLAMA_3_8B
    layers: int = LAYERS
    dtype: torch.dtype = torch.bfloat16

    def make(self, ranks: tuple[int, ...]) -> World:
        """Make a world with adapters of these ranks."""
        return World(msgspec.structs.replace(self.shape, layers=self.layers), ranks, self.device, self.dtype)


class Measurer:
    """Measures sides. ``lines`` holds the results, ``reasons`` why others are missing, both by (case, side)."""

    def __init__(
        self, timer: Timer, bytes_per_s: float, quick: bool = False, settings: WorldSettings | None = None
    ) -> None:
        self.lines: dict[tuple[str, str], Line] = {}
        self.reasons: dict[tuple[str, str], str] = {}
        self._timer = timer
        self._bytes_per_s = bytes_per_s
        self._quick = quick
        self._settings = settings or WorldSettings()
        self._world: World | None = None

    def measure(self, name: str, make: Make, case: LoraCase) -> None:
        """Time one side, once. The failure of one side is noted and does not end the others."""
        if (case.name, name) in self.lines:
            return
        try:
            self.lines[case.name, name] = self._measure(make, case)
        except Exception as error:
            self.reasons[case.name, name] = f"{type(error).__name__}: {error}".splitlines()[0]
            say(f"{case.name}, {name}: not measured, {self.reasons[case.name, name]}")

    def plan_ms(self, case: LoraCase) -> float:
        """Return the time to list a step's work, for LAYERS layers. More layers are listed in parallel."""
        return self._timer.ms(Ours(self._world_of(case), case).plan)

    def ratio(self, case: LoraCase, side: str, over: str = OURS, over_case: LoraCase | None = None) -> float | None:
        """Return the time of a side over another's, or None if either was not measured."""
        one, other = self.lines.get((case.name, side)), self.lines.get(((over_case or case).name, over))
        return None if one is None or other is None else one.ms / other.ms

    def _measure(self, make: Make, case: LoraCase) -> Line:
        world = self._world_of(case)
        operands = Operands(world, case)
        side = make(world, case)

        def step() -> None:
            run_layers(side, operands, world.shape.layers)

        error = _checked_error(side, world, case)
        untuned_ms = self._timer.ms(step)
        _tune(side, operands, world.shape.layers, self._timer, QUICK_OPTIONS if self._quick else None)
        ms = untuned_ms
        # A peer whose tuned blocks give a wrong result keeps the time of its own blocks.
        if side.knobs and largest_error(side, world, case) < allowed_error(side):
            ms = min(ms, self._timer.ms(step))
        line = Line(
            case=case.name,
            side=side.name,
            ms=ms / world.shape.layers,
            floor_ms=floor_ms(layer_bytes(world.shape, case), self._bytes_per_s),
            error=error,
            untuned_ms=untuned_ms / world.shape.layers,
        )
        say(f"{case.name}, {side.name}: {line.ms * 1e3:.1f} us per layer, {line.ratio:.2f} of the floor")
        return line

    def _world_of(self, case: LoraCase) -> World:
        """Return the adapters of the case. The last ones are kept: gigabytes that often serve the next case."""
        if self._world is None or self._world.ranks != case.ranks:
            self._world = None
            gc.collect()
            if self._settings.device == "cuda":
                torch.cuda.empty_cache()
            self._world = self._settings.make(case.ranks)
        return self._world


def _checked_error(side: Side, world: World, case: LoraCase) -> float:
    error, allowed = largest_error(side, world, case), allowed_error(side)
    if not error < allowed:
        raise WrongResultError(
            f"{side.name} is off by {error:.2g} of the largest element at {case.name}, {allowed} is allowed"
        )
    return error


def allowed_error(side: Side) -> float:
    """Return the largest error with which the time of a side counts."""
    return TOLERANCE if side.name == OURS else PEER_TOLERANCE


def _tune(side: Side, operands: Operands, layers: int, timer: Timer, options: int | None) -> None:
    """Set each knob of each module to the fastest of its first ``options`` settings, one knob after the other."""
    for module in range(len(MODULES)):

        def step(module: int = module) -> None:
            for layer in range(layers):
                side.add(operands.y[module], operands.x[module], layer, module)

        for knob, choices in side.knobs.items():
            setting = side.setting[module]
            setting[knob] = _fastest(step, timer, setting, knob, choices[:options])


def _fastest(
    step: Callable[[], None], timer: Timer, setting: dict[str, object], knob: str, choices: list[object]
) -> object:
    """Return the fastest choice of a knob. Raises the error of the first choice if none runs."""
    times: list[tuple[float, object]] = []
    errors: list[Exception] = []
    for choice in choices:
        setting[knob] = choice
        try:
            times.append((timer.ms(step), choice))
        except Exception as error:  # compilers raise many types of errors for sizes that do not fit
            errors.append(error)
    if not times:
        raise errors[0]
    return min(times, key=lambda pair: pair[0])[1]
