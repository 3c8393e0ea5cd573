"""Compares step times with transformers + peft. The two sides take turns in every round."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.cases import Case, most_adapters
from harness.report import Number, ratio, rounded, say, table
from harness.worker import Worker
from loraserve.device import core_count

Times = dict[Case, list[float]]


class StepEffort(NamedTuple):
    """Which cases each side measures, in how many rounds of how many steps, and whether operations are timed too."""

    ours: Sequence[Case]
    theirs: Sequence[Case]
    rounds: int
    steps: int
    profile: bool = False


class StepComparison:
    """Results of the comparison: by case, the median step of each round in seconds."""

    def __init__(self) -> None:
        self.ours: Times = {}
        self.theirs: Times = {}
        self.weights = ""
        self.operations: list[tuple[str, float, float]] = []

    def measure(self, model: Path, adapters: Path, environment: Mapping[str, str], effort: "StepEffort") -> None:
        """Run several rounds over all cases, each side in a process with its own OpenMP settings."""
        arguments = [str(model), str(adapters), str(core_count()), str(effort.steps)]
        ours, theirs = effort.ours, effort.theirs
        say("engine steps: loading both sides")
        our_worker = Worker("ours", [*arguments, str(most_adapters(ours))], environment)
        their_worker = Worker("transformers_peft", [*arguments, str(most_adapters(theirs))], {})
        with our_worker as our_side, their_worker as their_side:
            self.weights = our_side.hello["weights"]
            for turn in range(effort.rounds):
                say(f"engine steps against transformers + peft: round {turn + 1} of {effort.rounds}")
                for case in dict.fromkeys([*ours, *theirs]):
                    if case in ours:
                        _note(self.ours, case, our_side)
                    if case in theirs:
                        _note(self.theirs, case, their_side)
            if effort.profile:
                answer = our_side.ask(**Case(16, 16)._asdict(), profile=True)
                self.operations = [tuple(row) for row in answer["operations"]]

    def best_s(self, side: Times, case: Case) -> Number:
        """Return the best round, because other load on the machine only adds time."""
        return min(side[case]) if case in side else None

    def ratio(self, case: Case) -> float | None:
        """Return the speed relative to transformers + peft."""
        return ratio(self.best_s(self.theirs, case), self.best_s(self.ours, case))

    def lora_share(self) -> float | None:
        """Return the share of a step at batch 16 that 16 adapters on all seven projections add."""
        base, mixed = (self.best_s(self.ours, Case(16, adapters)) for adapters in (0, 16))
        return None if not base or not mixed else rounded(1 - base / mixed)

    def figures(self) -> dict[str, Number]:
        found: dict[str, Number] = {}
        for prefix, side in (("", self.ours), ("transformers_", self.theirs)):
            for case in side:
                seconds = self.best_s(side, case)
                found[f"{prefix}{case.name}_tok_s"] = case.batch * case.tokens / seconds if seconds else None
        return found

    def tables(self) -> str:
        rows = []
        for case in self.ours:
            ours, theirs = self.best_s(self.ours, case), self.best_s(self.theirs, case)
            tokens = case.batch * case.tokens
            label = f"prefill {case.tokens}" if case.tokens > 1 else f"decode, batch {case.batch}"
            speeds = [seconds and tokens / seconds for seconds in (ours, theirs)]
            rows.append([label, case.adapters, ours and ours * 1e3, *speeds, self.ratio(case)])
        header = ["", "adapters", "ms/step", "tok/s", "transformers+peft", "ratio"]
        text = table(f"Steps in process ({self.weights} weights, {core_count()} threads, best round)", header, rows)
        if self.operations:
            text += "\n" + _profile_table(self.operations)
        return text


def _note(times: Times, case: Case, side: Worker) -> None:
    steps: list[float] = side.ask(**case._asdict())["steps_s"]
    times.setdefault(case, []).append(statistics.median(steps))


def _profile_table(operations: list[tuple[str, float, float]]) -> str:
    rows: list[list[Any]] = [[name, calls, seconds * 1e3] for name, calls, seconds in operations]
    known = sum(seconds for name, _, seconds in operations if name != "step")
    step = next(seconds for name, _, seconds in operations if name == "step")
    rows.append(["everything else", None, (step - known) * 1e3])
    return table("One decode step at batch 16 with 16 adapters", ["operation", "calls", "ms"], rows)
