"""Times each operation of the decoder within selected steps."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import loraserve.engine.compute.runner as runner
import loraserve.engine.model.decoder as decoder
from loraserve.engine.model.linear import Fp16Linear, Linear
from loraserve.model_shape import MODULES

OPERATIONS = ("add_lora", "paged_attention", "add_rms_norm", "rotate", "silu_mul")


class Profile:
    """Seconds by operation, summed over the steps marked by ``begin_step(True)``."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._calls: dict[str, int] = defaultdict(int)
        self._steps = 0
        self._on = False

    def begin_step(self, wanted: bool) -> None:
        self._on = wanted
        self._steps += wanted

    def table(self) -> list[tuple[str, float, float]]:
        """Return (operation, calls per step, seconds per step), the most expensive first. "step" is the total."""
        steps = max(1, self._steps)
        rows = [(name, self._calls[name] / steps, seconds / steps) for name, seconds in self._seconds.items()]
        return sorted(rows, key=lambda row: -row[2])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the operations within the block."""
        self._seconds.clear()
        self._calls.clear()
        self._steps = 0
        places: list[tuple[Any, str]] = [(decoder, name) for name in OPERATIONS]
        places += [(runner, "sample"), (runner, "_make_inputs"), (runner.CpuRunner, "step")]
        places += [(Linear, "__call__"), (Fp16Linear, "__call__")]
        originals = [(owner, name, getattr(owner, name)) for owner, name in places]
        try:
            for owner, name, original in originals:
                setattr(owner, name, self._timed(original, "linear" if name == "__call__" else name.strip("_")))
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)

    def _timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **operands: Any) -> Any:
            if not self._on:
                return function(*arguments, **operands)
            started_s = time.perf_counter()
            result = function(*arguments, **operands)
            label = f"{name} {MODULES[operands['module']]}" if name == "add_lora" else name
            self._seconds[label] += time.perf_counter() - started_s
            self._calls[label] += 1
            return result

        return call
