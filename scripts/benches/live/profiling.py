"""Measures a profile of the bench's engine, with as many engines running concurrently as in the bench.

CPU time is measured and divided by the share of a core that each engine is limited to, which gives the wall time there.
Concurrent engines compete for caches and memory bandwidth as in the live cluster; unlike wall time, CPU time does not
include other load on the machine. Each engine measures different batches. One fit uses the samples of all engines.
"""

import datetime
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import msgspec
from harness.report import BenchError, machine, say
from harness.worker import Worker

from live.cpu_share import share_of_core
from live.scene import ENGINE_SETTINGS, ENGINES, Scene, mean_prompt_tokens
from loraserve.cost import StepShape
from loraserve.cost.fit import fit_cost_model
from loraserve.cost.profile import EngineShape, Profile
from loraserve.sim.workload import RANKS


class Profiled(NamedTuple):
    """A profile. ``alone_s``: prefill time of a mean prompt on an idle engine."""

    profile: Profile
    alone_s: float


def measure_profile(scene: Scene, batches: int, rounds: int) -> Profiled:
    """Measure ``batches`` on each engine. Raises BenchError if an engine or the fit fails."""
    say(f"profile: {ENGINES} engines at once, {batches} batches each")
    arguments = [str(scene.model), ",".join(map(str, RANKS)), *ENGINE_SETTINGS]
    started = [Worker("profiled_engine", arguments, {}) for _ in range(ENGINES)]
    with ExitStack() as stack:
        workers = [stack.enter_context(worker) for worker in started]
        answers = _all_at_once(workers, batches, rounds, mean_prompt_tokens(scene.workload))
        limits = workers[0].hello["limits"]
    return fitted(scene, limits, answers)


def _all_at_once(workers: Sequence[Worker], batches: int, rounds: int, prompt_tokens: int) -> list[dict[str, Any]]:
    def ask(seed: int) -> dict[str, Any]:
        question = {"batches": batches, "rounds": rounds, "seed": seed, "prompt_tokens": prompt_tokens}
        answer: dict[str, Any] = workers[seed].ask(**question)
        return answer

    with ThreadPoolExecutor(len(workers)) as pool:
        return list(pool.map(ask, range(len(workers))))


def fitted(scene: Scene, limits: dict[str, Any], answers: Sequence[dict[str, Any]]) -> Profiled:
    # Interleaved, so that samples of every engine are in the part that the fit is tested on.
    rows = [row for turn in zip(*(answer["steps"] for answer in answers), strict=True) for row in turn]
    share = share_of_core(ENGINES)
    steps = [(msgspec.convert(shape, StepShape), cpu_s / share) for shape, cpu_s in rows]
    loads = [(int(size), cpu_s / share) for answer in answers for size, cpu_s in answer["loads"]]
    try:
        cost, residuals = fit_cost_model(steps, loads, "exact")
    except ValueError as error:
        raise BenchError(f"what {ENGINES} engines measured cannot be fitted: {error}") from error
    fields = ("kv_blocks", "block_tokens", "pool_bytes", "max_running", "max_step_tokens", "max_model_tokens")
    largest = max(loads)[0] // max(RANKS)
    profile = Profile(
        model=scene.model.name,
        shape=scene.shape,
        hardware=f"{machine()}; {ENGINES} engines, each {share:.2f} of a core",
        date=datetime.date.today().isoformat(),
        origin="measured",
        cost=cost,
        engine=EngineShape(**{name: limits[name] for name in fields}, slab_bytes_per_rank=largest),
        device="cpu",
        residuals=residuals,
    )
    return Profiled(profile, statistics.median(answer["alone_s"] / share for answer in answers))
