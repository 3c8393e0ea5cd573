"""A profile of this very engine: as many at once as the bench has, each held to the same share of a core.

Each times other batches, so that together they are the samples of one fit; what they lose to each other (memory
bandwidth, caches) and to being stopped is in the times, as it is in the live cluster.
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

from live.cpu_share import held_to, share_of_core
from live.scene import ENGINE_SETTINGS, ENGINES, Scene, mean_prompt_tokens
from loraserve.cost import StepShape
from loraserve.cost.fit import fit
from loraserve.cost.profile import EngineShape, Profile
from loraserve.sim.workload import RANKS


class Profiled(NamedTuple):
    """``alone_s``: a mean prompt's prefill with nothing else on the engine."""

    profile: Profile
    alone_s: float


def measure_profile(scene: Scene, batches: int, rounds: int) -> Profiled:
    """``batches`` on each engine. Raises BenchError where engines end or what they measure cannot be fitted."""
    say(f"profile: {ENGINES} engines at once, each at {share_of_core(ENGINES):.2f} of a core, {batches} batches each")
    arguments = [str(scene.model), ",".join(map(str, RANKS)), *ENGINE_SETTINGS]
    started = [Worker("profiled_engine", arguments, {}) for _ in range(ENGINES)]
    with ExitStack() as stack:
        workers = [stack.enter_context(worker) for worker in started]
        stack.enter_context(held_to(share_of_core(ENGINES), [worker.hello["pid"] for worker in workers]))
        answers = _all_at_once(workers, batches, rounds, mean_prompt_tokens(scene.workload))
        limits = workers[0].hello["limits"]
    return _fitted(scene, limits, answers)


def _all_at_once(workers: Sequence[Worker], batches: int, rounds: int, prompt_tokens: int) -> list[dict[str, Any]]:
    def ask(seed: int) -> dict[str, Any]:
        question = {"batches": batches, "rounds": rounds, "seed": seed, "prompt_tokens": prompt_tokens}
        answer: dict[str, Any] = workers[seed].ask(**question)
        return answer

    with ThreadPoolExecutor(len(workers)) as pool:
        return list(pool.map(ask, range(len(workers))))


def _fitted(scene: Scene, limits: dict[str, Any], answers: Sequence[dict[str, Any]]) -> Profiled:
    # In turn, so that every engine has its part in what the fit is tested on.
    rows = [row for turn in zip(*(answer["steps"] for answer in answers), strict=True) for row in turn]
    steps = [(msgspec.convert(shape, StepShape), seconds) for shape, seconds in rows]
    loads = [(int(size), seconds) for answer in answers for size, seconds in answer["loads"]]
    try:
        cost, residuals = fit(steps, loads, "exact")
    except ValueError as error:
        raise BenchError(f"what {ENGINES} engines measured cannot be fitted: {error}") from error
    fields = ("kv_blocks", "block_tokens", "pool_bytes", "max_running", "max_step_tokens", "max_model_tokens")
    largest = max(loads)[0] // max(RANKS)
    profile = Profile(
        model=scene.model.name,
        shape=scene.shape,
        hardware=f"{machine()}; {ENGINES} engines, each {share_of_core(ENGINES):.2f} of a core",
        date=datetime.date.today().isoformat(),
        origin="measured",
        cost=cost,
        engine=EngineShape(**{name: limits[name] for name in fields}, slab_bytes_per_rank=largest),
        device="cpu",
        residuals=residuals,
    )
    return Profiled(profile, statistics.median(answer["alone_s"] for answer in answers))
