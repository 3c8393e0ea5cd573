"""Case after case on a GPU: checked against the definition first, then timed; peers with their blocks tuned."""

import gc
from collections.abc import Callable

import msgspec
import torch

from loraserve.benchmarks.lora.cases import LAYERS, LLAMA_3_8B, Case
from loraserve.benchmarks.lora.floor import layer_bytes, milliseconds
from loraserve.benchmarks.lora.program import OURS
from loraserve.benchmarks.lora.report import say
from loraserve.benchmarks.lora.sides import PEER_TOLERANCE, TOLERANCE, Ours, Side, error, run_layers
from loraserve.benchmarks.lora.timing import Timer
from loraserve.benchmarks.lora.world import Operands, World
from loraserve.model_shape import MODULES, ModelShape

QUICK_OPTIONS = 2
"""Of each knob, the default among them."""

Make = Callable[[World, Case], Side]


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One side at one case: milliseconds a layer, beside the floor of the true bytes."""

    case: str
    side: str
    ms: float
    floor_ms: float
    error: float
    untuned_ms: float

    @property
    def ratio(self) -> float:
        return self.ms / self.floor_ms


class Wrong(Exception):
    """A side computes something else than the definition: its time would mean nothing."""


class Measurer:
    """``lines`` has what was measured, ``reasons`` why the rest was not, by (case, side)."""

    def __init__(
        self,
        timer: Timer,
        bytes_per_s: float,
        device: str = "cuda",
        shape: ModelShape = LLAMA_3_8B,
        layers: int = LAYERS,
        dtype: torch.dtype = torch.bfloat16,
        quick: bool = False,
    ) -> None:
        self.lines: dict[tuple[str, str], Line] = {}
        self.reasons: dict[tuple[str, str], str] = {}
        self._timer = timer
        self._bytes_per_s = bytes_per_s
        self._device = device
        self._shape = msgspec.structs.replace(shape, layers=layers)
        self._dtype = dtype
        self._quick = quick
        self._world: World | None = None

    def measure(self, name: str, make: Make, case: Case) -> None:
        """Time one side, once. One that is not there, or does not run here, must not cost the figures of the others."""
        if (case.name, name) in self.lines:
            return
        try:
            self.lines[case.name, name] = self._measure(make, case)
        except Exception as problem:
            self.reasons[case.name, name] = f"{type(problem).__name__}: {problem}".splitlines()[0]
            say(f"{case.name}, {name}: not measured, {self.reasons[case.name, name]}")

    def plan_ms(self, case: Case) -> float:
        """What ours does once a step, for the layers that are here; those of a model list more rows side by side."""
        return self._timer.ms(Ours(self._world_of(case), case).plan)

    def ratio(self, case: Case, side: str, over: str = OURS, over_case: Case | None = None) -> float | None:
        """Time of a side over another's, None where either was not measured."""
        one, other = self.lines.get((case.name, side)), self.lines.get(((over_case or case).name, over))
        return None if one is None or other is None else one.ms / other.ms

    def _measure(self, make: Make, case: Case) -> Line:
        world = self._world_of(case)
        operands = Operands(world, case)
        side = make(world, case)

        def step() -> None:
            run_layers(side, operands, world.shape.layers)

        off = _checked(side, world, case)
        untuned_ms = self._timer.ms(step)
        tune(side, operands, world.shape.layers, self._timer, QUICK_OPTIONS if self._quick else None)
        ms = untuned_ms
        # What its compiler gets wrong at other sizes than its own is not held against a peer, nor for it.
        if side.knobs and error(side, world, case) < allowed(side):
            ms = min(ms, self._timer.ms(step))
        line = Line(
            case=case.name,
            side=side.name,
            ms=ms / world.shape.layers,
            floor_ms=milliseconds(layer_bytes(world.shape, case), self._bytes_per_s),
            error=off,
            untuned_ms=untuned_ms / world.shape.layers,
        )
        say(f"{case.name}, {side.name}: {line.ms * 1e3:.1f} us a layer, {line.ratio:.2f} of the floor")
        return line

    def _world_of(self, case: Case) -> World:
        """The adapters of the case; those of the last one are kept, gigabytes that often serve the next."""
        if self._world is None or self._world.ranks != case.ranks:
            self._world = None
            gc.collect()
            if self._device == "cuda":
                torch.cuda.empty_cache()
            self._world = World(self._shape, case.ranks, self._device, self._dtype)
        return self._world


def _checked(side: Side, world: World, case: Case) -> float:
    off = error(side, world, case)
    if not off < allowed(side):
        raise Wrong(
            f"{side.name} is off by {off:.2g} of the largest element at {case.name}, {allowed(side)} is allowed"
        )
    return off


def allowed(side: Side) -> float:
    """Largest error with which a side's time still means something."""
    return TOLERANCE if side.name == OURS else PEER_TOLERANCE


def tune(side: Side, operands: Operands, layers: int, timer: Timer, options: int | None = None) -> None:
    """Give each module of a side the fastest of each knob's first ``options`` settings, one knob after the other."""
    for module in range(len(MODULES)):
        for knob, choices in side.knobs.items():
            side.setting[module][knob] = _fastest(side, operands, layers, timer, module, knob, choices[:options])[1]


def _fastest(
    side: Side, operands: Operands, layers: int, timer: Timer, module: int, knob: str, choices: list[object]
) -> tuple[float, object]:
    """(ms, choice). Raises what the first choice raised where none runs."""
    found: list[tuple[float, object]] = []
    problems: list[Exception] = []

    def step() -> None:
        for layer in range(layers):
            side.add(operands.y[module], operands.x[module], layer, module)

    for choice in choices:
        side.setting[module][knob] = choice
        try:
            found.append((timer.ms(step), choice))
        except Exception as problem:  # whatever a compiler says of sizes that do not fit
            problems.append(problem)
    if not found:
        raise problems[0]
    return min(found, key=lambda pair: pair[0])
