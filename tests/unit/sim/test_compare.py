"""Comparisons find the figures of a known queue and report missed goals."""

from collections.abc import Sequence
from math import inf

import msgspec
import pytest

from loraserve.errors import ConfigError
from loraserve.sim import report
from loraserve.sim.compare import PRECISION, CompareOptions, Comparison, compare
from loraserve.sim.runs import RunFigures, RunSpec
from loraserve.sim.workload import WorkloadShape
from loraserve.testing.small_profile import small_profile

CAPACITY_RPS = {"ours": 30.0, "toppings": 24.0, "slora-random": 10.0}
"""At 4 engines."""
BASE = RunSpec(source=WorkloadShape(), policy="ours", engines=4, rps=0.0, profile=small_profile())


def queue(jobs: Sequence[RunSpec]) -> list[RunFigures]:
    """Return figures with the P95 of an M/M/1-like queue, which is hopeless at its capacity and above."""
    points = []
    for job in jobs:
        load = job.rps / (CAPACITY_RPS[job.policy] * job.engines / 4)
        p95_s = 0.5 / (1 - load) if load < 0.99 else inf
        points.append(
            RunFigures(
                policy=job.policy,
                engines=job.engines,
                rps=job.rps,
                p50_ttft_s=p95_s / 3,
                p95_ttft_s=p95_s,
                goodput_rps=job.rps,
                decode_s=1.0,
                busy_share=min(load, 1.0),
                bytes_share=1.0 if job.policy == "toppings" else 0.3,
                held_share=0.4,
                adapters_per_engine=10.0,
                moves_per_interval=0.0,
                rejected=0,
                hopeless=p95_s > 30,
            )
        )
    return points


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(BASE, list(CAPACITY_RPS), 7.0, queue, CompareOptions())


@pytest.mark.parametrize("policy", CAPACITY_RPS)
def test_the_largest_load_is_found_where_p95_crosses_the_slo(policy: str, comparison: Comparison) -> None:
    crossing_rps = CAPACITY_RPS[policy] * (1 - 0.5 / 10)
    assert crossing_rps / (1 + PRECISION) <= comparison.results[policy].max_rps <= crossing_rps


@pytest.mark.parametrize("guess_rps", [0.01, 1.0, 1000.0])
def test_a_wrong_guess_does_not_change_the_result(guess_rps: float) -> None:
    found = compare(BASE, ["toppings"], guess_rps, queue, CompareOptions(shares=(0.8,), count_engines=False))
    assert 24 * 0.95 / (1 + PRECISION) <= found.results["toppings"].max_rps <= 24 * 0.95


def test_policies_are_compared_at_shares_of_the_best_baselines_load(comparison: Comparison) -> None:
    assert comparison.best_baseline == "toppings"
    best_rps = comparison.best_baseline_rps
    assert comparison.p95_at("ours", 0.8) == pytest.approx(0.5 / (1 - 0.8 * best_rps / 30))
    assert comparison.p95_at("slora-random", 1.2) == inf


def test_engines_needed_are_the_fewest_that_serve_the_load(comparison: Comparison) -> None:
    assert comparison.results["toppings"].engines_needed == 4
    assert comparison.results["ours"].engines_needed == 4, "3 engines would have a capacity of 22.5"
    assert comparison.results["slora-random"].engines_needed == 10


def test_a_policy_that_never_meets_the_slo_has_no_number_of_engines() -> None:
    def never(jobs: Sequence[RunSpec]) -> list[RunFigures]:
        return [
            msgspec.structs.replace(p, p95_ttft_s=inf, hopeless=True) if p.policy == "slora-random" else p
            for p in queue(jobs)
        ]

    found = compare(BASE, list(CAPACITY_RPS), 7.0, never, CompareOptions())
    assert found.results["slora-random"].engines_needed is None
    assert found.results["slora-random"].max_rps == 0.0


def test_the_missed_goals_are_named(comparison: Comparison) -> None:
    said = " ".join(report.missed_goals(comparison, limit_rps=30.0))
    assert "30.0% of all adapter bytes" in said
    assert "2 times" not in said
    results = {**comparison.results, "ours": comparison.results["slora-random"]}
    worse = " ".join(report.missed_goals(msgspec.structs.replace(comparison, results=results), limit_rps=12.0))
    assert "1.00 times that of slora-random; the goal is 2 times (" in worse
    assert "above the upper bound of 12 rps for every placement)" in worse
    assert "P95 TTFT at 80% load" in worse


def test_infinite_figures_are_null_in_json(comparison: Comparison) -> None:
    found = report.json_figures(comparison)
    assert found["slora-random"]["p95_at_80pct_s"] is None
    assert set(found["ours"]) == {
        "max_rps",
        "max_rps_draws",
        "p95_at_80pct_s",
        "engines_needed",
        "adapter_bytes_share",
        "moves_per_interval",
    }


def test_tables_name_every_policy_and_load(comparison: Comparison) -> None:
    assert all(name in report.summary_table(comparison) for name in CAPACITY_RPS)
    assert "120%" in report.load_table(comparison)
    assert report.gains({"w": comparison})["vs_toppings_best"] == pytest.approx(1.25, rel=0.05)


def test_a_grid_includes_workloads_that_toppings_cannot_serve(comparison: Comparison) -> None:
    toppings = msgspec.structs.replace(comparison.results["toppings"], max_rps=0.0)
    results = {**comparison.results, "toppings": toppings}
    assert "  -  " in report.grid_table({"w": msgspec.structs.replace(comparison, results=results)})


def test_a_run_too_short_for_any_overload_is_reported(comparison: Comparison) -> None:
    def patient(jobs: Sequence[RunSpec]) -> list[RunFigures]:
        return [msgspec.structs.replace(p, p95_ttft_s=1.0, hopeless=False) for p in queue(jobs)]

    assert report.never_overloaded_text(comparison) == []
    (text,) = report.never_overloaded_text(compare(BASE, list(CAPACITY_RPS), 7.0, patient, CompareOptions()))
    assert all(name in text for name in CAPACITY_RPS)


def test_a_comparison_without_a_baseline_that_meets_the_slo_is_refused() -> None:
    def never(jobs: Sequence[RunSpec]) -> list[RunFigures]:
        return [msgspec.structs.replace(p, p95_ttft_s=inf, hopeless=True) for p in queue(jobs)]

    with pytest.raises(ConfigError, match="--slo-s"):
        compare(BASE, list(CAPACITY_RPS), 7.0, never, CompareOptions())
