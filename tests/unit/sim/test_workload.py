"""Workloads: drawn, from traces, and at other loads."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from loraserve.errors import ConfigError
from loraserve.sim.runs import make_workload
from loraserve.sim.traces import TraceRequest
from loraserve.sim.workload import (
    RANKS,
    TraceSource,
    Workload,
    WorkloadShape,
    draw_workload,
    grid_shapes,
    trace_workload,
)

UNIT = 1 << 20


def trace(requests: int = 800, clients: int = 3) -> list[TraceRequest]:
    """Return a trace in which the first client sends half of the requests."""
    names = ["big"] * clients + [f"small-{i}" for i in range(clients)]
    return [TraceRequest(i * 0.5, names[i % len(names)], 10 + i, 5) for i in range(requests)]


def source(adapters: int, requests: int) -> TraceSource:
    return TraceSource(path="t.csv", adapters=adapters, requests=requests)


def mean_rank(workload: Workload, first: int, last: int) -> float:
    ranks = [workload.adapters[r.adapter].rank for r in workload.requests[first:last]]
    return sum(ranks) / len(ranks)


def test_a_workload_at_another_load_has_the_same_requests() -> None:
    workload = draw_workload(WorkloadShape(requests=400), UNIT)
    faster = workload.at(50.0)
    assert faster.rps == pytest.approx(50.0)
    assert [(r.adapter, r.prompt_tokens) for r in faster.requests] == [
        (r.adapter, r.prompt_tokens) for r in workload.requests
    ]


def test_a_drawn_workload_depends_on_its_seed_only() -> None:
    assert draw_workload(WorkloadShape(requests=50), UNIT) == draw_workload(WorkloadShape(requests=50), UNIT)
    assert (
        draw_workload(WorkloadShape(requests=50, seed=1), UNIT).requests
        != draw_workload(WorkloadShape(requests=50), UNIT).requests
    )


def test_ranks_of_a_trace_workload_do_not_depend_on_the_load() -> None:
    few, many = (trace_workload(trace(), source(12, requests), UNIT) for requests in (100, 700))
    assert few.adapters == many.adapters
    assert few.requests[0] == many.requests[0]


def test_bursts_vary_more_than_poisson() -> None:
    def variation(shape: WorkloadShape) -> float:
        times = [r.time_s for r in draw_workload(shape, UNIT).requests]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        mean = sum(gaps) / len(gaps)
        return float((sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / mean)

    assert variation(WorkloadShape(requests=5000)) == pytest.approx(1.0, abs=0.1)
    assert variation(WorkloadShape(requests=5000, arrivals="bursts")) == pytest.approx(3.0, abs=0.5)


def test_ranks_drift_towards_large_ones_and_popularity_reverses() -> None:
    ranks = draw_workload(WorkloadShape(requests=6000, drift="ranks"), UNIT)
    assert mean_rank(ranks, 5000, 6000) > 1.3 * mean_rank(ranks, 0, 1000)
    popular = draw_workload(WorkloadShape(requests=6000, drift="popularity"), UNIT)
    first, last = (Counter(r.adapter for r in popular.requests[a : a + 1000]).most_common(3) for a in (0, 5000))
    assert {a for a, _ in first} != {a for a, _ in last}


def test_the_grid_has_24_different_workloads_with_every_length_for_every_mix() -> None:
    shapes = grid_shapes()
    assert len({shape.name for shape in shapes}) == 24
    for mix in {shape.ranks for shape in shapes}:
        assert len({shape.lengths for shape in shapes if shape.ranks == mix}) == 3


def test_clients_with_more_requests_get_more_adapters() -> None:
    workload = trace_workload(trace(), source(20, 800), UNIT)
    owners = Counter(a.name.partition("/")[0] for a in workload.adapters)
    assert sum(owners.values()) == 20
    assert owners["big"] > owners["small-0"] >= 1
    assert Counter(a.rank for a in workload.adapters) == dict.fromkeys(RANKS, 4)
    asked = Counter(workload.adapters[r.adapter].name for r in workload.requests)
    assert asked["big/0"] > asked["big/3"] > 0


def test_a_client_uses_its_own_adapters_only() -> None:
    requests = trace()
    workload = trace_workload(requests, source(20, 800), UNIT)
    for original, drawn in zip(requests, workload.requests, strict=True):
        assert workload.adapters[drawn.adapter].name.startswith(original.client + "/")


def test_small_clients_share_the_last_adapter() -> None:
    workload = trace_workload(trace(), source(2, 800), UNIT)
    assert {r.adapter for r in workload.requests} == {0, 1}


def test_a_part_of_a_trace_is_its_first_requests() -> None:
    workload = trace_workload(trace(), source(4, 80), UNIT)
    assert [r.prompt_tokens for r in workload.requests] == list(range(10, 90))
    assert workload.rps == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize(("adapters", "requests"), [(0, trace()), (5, trace(1)), (5, [])])
def test_a_workload_without_a_rate_is_refused(adapters: int, requests: list[TraceRequest]) -> None:
    with pytest.raises(ConfigError, match=r"at least one adapter|at the same time"):
        trace_workload(requests, source(adapters, 10), UNIT)


def test_a_trace_without_a_rate_is_named_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    path.write_text("time_s,client,prompt_tokens,output_tokens\n" + "7,a,1,1\n" * 3)
    with pytest.raises(ConfigError, match=f"^{path}: the first 2 requests arrive at the same time"):
        make_workload(TraceSource(path=str(path), adapters=2, requests=2), UNIT)
