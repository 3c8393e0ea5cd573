"""Measures TTFT on a live cluster of four engines under each policy, and compares it with the simulator.

Every policy gets the same requests at the same times over HTTP, on a cluster of its own: all processes, real ZeroMQ,
a small random model, adapters of ranks 8 to 128. Engines share this machine's cores, so each is limited to a share of a
core, as if it had a device of its own. A profile, measured with all four engines at their share, determines the load,
and the simulator computes with it. TTFT is measured by the client from the time at which the request was due.

``ours``: our planner and router. ``loraserve``: the paper's planner, requests routed randomly by its shares.
``slora-random`` and ``slora-contiguous``: adapters assigned once (planner.pins), each request to its adapter's engine.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness.report import BenchError, Number, last_line, ratio, say, table
from live.cluster import LiveResult, run_live
from live.cpu_share import share_of_core
from live.policies import CONTIGUOUS, LIVE_POLICIES, OURS, RANDOM, LivePolicy
from live.prediction import Predicted, predict
from live.profiling import Profiled, measure_profile
from live.scene import ENGINES, Scene, make_scene

from loraserve.cost.profile import write_profile
from loraserve.errors import LoraServeError
from loraserve.sim.compare import capacity_rps
from loraserve.sim.workload import Workload

LOAD = 0.7
"""Share of the capacity that the profile predicts for full batches and equally loaded engines."""
SLO_FACTOR = 5.0
"""The SLO as a multiple of the TTFT of a mean prompt on an idle engine."""


LEAST_REQUESTS = 40


class Effort(NamedTuple):
    """The duration under each policy, and the number of batches and rounds of the profile."""

    seconds: float
    policies: tuple[LivePolicy, ...]
    batches: int
    rounds: int


WHOLE = Effort(45.0, LIVE_POLICIES, 48, 3)
QUICK = Effort(7.0, (OURS, RANDOM), 14, 2)


class Bench:
    """The measurements and predictions by policy."""

    def __init__(self, scene: Scene, profiled: Profiled, load: float, slo_factor: float, seconds: float) -> None:
        self.profiled = profiled
        self.scene = scene
        self.load = load
        self.slo_s = slo_factor * profiled.alone_s
        rps = load * capacity_rps(scene.workload, profiled.profile, ENGINES)
        self.workload = first_seconds(scene.workload.at(rps), seconds)
        self.live: dict[str, LiveResult] = {}
        self.predicted: dict[str, Predicted] = {}

    def measure(self, policy: LivePolicy, profile: Path) -> None:
        """Measure a policy. Its figures stay null if its cluster fails."""
        try:
            with tempfile.TemporaryDirectory(prefix="loraserve-bench-") as folder:
                result = run_live(Path(folder), self.scene, self.workload, policy, self.slo_s, profile)
        except (LoraServeError, BenchError) as error:
            say(f"{policy.name}: {error}")
            return
        self.live[policy.name] = result

    def predict(self, policy: LivePolicy) -> None:
        self.predicted[policy.name] = predict(self.workload, policy.name, self.profiled.profile, self.slo_s)

    def p95_s(self, policy: LivePolicy) -> Number:
        result = self.live.get(policy.name)
        return result and result.replayed.ttft_s(0.95)

    def goodput_rps(self, policy: LivePolicy) -> Number:
        result = self.live.get(policy.name)
        return result and result.replayed.goodput_rps(self.slo_s)

    def predicted_p95_s(self, policy: LivePolicy) -> Number:
        found = self.predicted.get(policy.name)
        return found and found.p95_s

    def ratios(self) -> dict[str, Number]:
        return {
            "p95_vs_random": ratio(self.p95_s(OURS), self.p95_s(RANDOM)),
            "p95_vs_contiguous": ratio(self.p95_s(OURS), self.p95_s(CONTIGUOUS)),
            "goodput_vs_random": ratio(self.goodput_rps(OURS), self.goodput_rps(RANDOM)),
            "predicted_vs_measured_p95": ratio(self.predicted_p95_s(OURS), self.p95_s(OURS)),
        }

    def figures(self) -> dict[str, Number]:
        residuals = self.profiled.profile.residuals
        found: dict[str, Number] = {
            "requests": len(self.workload.requests),
            "rps": self.workload.rps,
            "load_of_capacity": self.load,
            "slo_ttft_s": self.slo_s,
            "engine_alone_ttft_s": self.profiled.alone_s,
            "profile_median_error": residuals and residuals.median,
            "profile_p90_error": residuals and residuals.p90,
        }
        for policy in LIVE_POLICIES:
            name = policy.name.replace("-", "_")
            result, predicted = self.live.get(policy.name), self.predicted.get(policy.name)
            found |= {f"{name}_{key}": value for key, value in _live_figures(result, self.slo_s).items()}
            found |= {
                f"{name}_predicted_p50_s": predicted and predicted.p50_s,
                f"{name}_predicted_p95_s": predicted and predicted.p95_s,
                f"{name}_predicted_goodput_rps": predicted and predicted.goodput_rps,
                f"{name}_predicted_engine_cores": predicted and predicted.busy * ENGINES * share_of_core(ENGINES),
            }
        return found

    def tables(self) -> str:
        title = (
            f"{len(self.workload.requests)} requests, {self.workload.rps:.1f} rps, {self.load:.0%} of capacity; SLO "
            f"{self.slo_s:.2f} s; TTFT in seconds, what the simulator predicts in brackets"
        )
        header = ["policy", "P50", "P95", "goodput rps", "errors", "alone", "requests by engine", "plans"]
        rows = [self._row(name) for name in self.live]
        text = table(title, header, rows)
        reasons = [[name, _counts(result.whys), *_cores(result)] for name, result in self.live.items()]
        return (
            text
            + "\n"
            + table(
                "Why the router chose", ["policy", "", "engines' cores", "services'", "others'", "waiting"], reasons
            )
        )

    def _row(self, name: str) -> list[object]:
        result, predicted = self.live[name], self.predicted.get(name)
        replayed = result.replayed
        return [
            name,
            _both(replayed.ttft_s(0.5), predicted and predicted.p50_s),
            _both(replayed.ttft_s(0.95), predicted and predicted.p95_s),
            _both(replayed.goodput_rps(self.slo_s), predicted and predicted.goodput_rps),
            replayed.errors,
            result.alone_s,
            "/".join(map(str, replayed.engines.values())),
            result.plans,
        ]


def first_seconds(workload: Workload, seconds: float) -> Workload:
    """Return the workload with only the requests of the first seconds."""
    return Workload(workload.name, workload.adapters, tuple(r for r in workload.requests if r.time_s <= seconds))


def _live_figures(result: LiveResult | None, slo_s: float) -> dict[str, Number]:
    replayed = result and result.replayed
    return {
        "p50_s": replayed and replayed.ttft_s(0.5),
        "p95_s": replayed and replayed.ttft_s(0.95),
        "goodput_rps": replayed and replayed.goodput_rps(slo_s),
        "errors": replayed and replayed.errors,
        "alone_ttft_s": result and result.alone_s,
        "generator_late_p95_s": replayed and replayed.late_s,
        "plans": result and result.plans,
        "engine_cores": result and result.engine_cores,
        "service_cores": result and result.service_cores,
        "other_cores": result and result.other_cores,
        "engine_threads_waiting": result and result.waiting,
    }


def _both(measured: Number, predicted: Number) -> str:
    return " ".join(
        ["-" if measured is None else f"{measured:.2f}", "(-)" if predicted is None else f"({predicted:.2f})"]
    )


def _counts(whys: dict[str, int]) -> str:
    return ", ".join(f"{why} {count}" for why, count in whys.items())


def _cores(result: LiveResult) -> list[Number]:
    return [result.engine_cores, result.service_cores, result.other_cores, result.waiting]


def main(arguments: Sequence[str]) -> int:
    """Return 0 on success, 1 if our policy or the profile could not be measured."""
    options = _parser().parse_args(arguments)
    effort = QUICK if options.quick else WHOLE
    seconds = options.seconds or effort.seconds
    with tempfile.TemporaryDirectory(prefix="loraserve-bench-") as folder:
        try:
            say("making the model and its adapters")
            # More requests than are sent: their number is known only after the engines were profiled.
            scene = make_scene(Path(folder), options.requests, options.trace, options.seed)
            profiled = measure_profile(scene, effort.batches, effort.rounds)
        except (LoraServeError, BenchError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        bench = Bench(scene, profiled, options.load, options.slo, seconds)
        profile = Path(folder) / "profile.json"
        write_profile(profiled.profile, profile)
        for policy in effort.policies:
            bench.measure(policy, profile)
            bench.predict(policy)
    print(bench.tables())
    print(last_line("policies", bench.ratios(), bench.figures()))
    return 0 if OURS.name in bench.live else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench policies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two policies, fewer requests, a less exact profile")
    parser.add_argument("--trace", default="", metavar="FILE", help="CSV of requests; default: random requests")
    parser.add_argument("--load", type=_positive, default=LOAD, help=f"share of the engines' capacity ({LOAD})")
    parser.add_argument("--slo", type=_positive, default=SLO_FACTOR, help=f"SLO in idle TTFTs ({SLO_FACTOR})")
    parser.add_argument("--seconds", type=_positive, help=f"duration under each policy ({WHOLE.seconds:.0f})")
    parser.add_argument(
        "--requests", type=_requests, default=2000, help="number of requests to draw; those of --seconds are sent"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the workload (0)")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0")
    return value


def _requests(text: str) -> int:
    value = int(text)
    if value < LEAST_REQUESTS:
        raise argparse.ArgumentTypeError(f"{text}: at least {LEAST_REQUESTS} are needed for percentiles")
    return value


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
