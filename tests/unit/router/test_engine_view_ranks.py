"""The mean largest rank that is expected on an engine."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.cost import CostModel
from loraserve.messages import AdapterDemand, AdapterRef
from loraserve.router.context import Candidates, RoutingContext, Slo
from loraserve.router.engine_view import mean_largest_rank
from loraserve.router.policy import route_by_prediction
from loraserve.router.view import ClusterView
from loraserve.testing.reports import adapter_ref, engine_seen, picture, resident, route_request

LOW, HIGH, OTHER_HIGH = adapter_ref(0, rank=8), adapter_ref(1, rank=128), adapter_ref(2, rank=128)
SEQUENCES = st.dictionaries(st.sampled_from([8, 16, 64, 128]), st.floats(0, 50), min_size=1)


def poisson(mean: float, rng: Random) -> int:
    count, time = 0, rng.expovariate(1.0)
    while time < mean:
        count, time = count + 1, time + rng.expovariate(1.0)
    return count


def test_mean_largest_rank_matches_random_batches() -> None:
    sequences, rng = {8: 4.0, 64: 0.5, 128: 0.1}, Random(0)
    batches = [max((r for r, n in sequences.items() if poisson(n, rng)), default=0) for _ in range(40_000)]
    assert mean_largest_rank(sequences) == pytest.approx(sum(batches) / len(batches), rel=0.02)


@given(SEQUENCES)
def test_mean_largest_rank_is_between_0_and_the_largest_rank(sequences: dict[int, float]) -> None:
    assert 0 <= mean_largest_rank(sequences) <= max(sequences)


@given(SEQUENCES, st.sampled_from([8, 16, 64, 128]), st.floats(0, 5))
def test_more_sequences_never_lower_the_mean_largest_rank(sequences: dict[int, float], rank: int, more: float) -> None:
    larger = {**sequences, rank: sequences.get(rank, 0.0) + more}
    assert mean_largest_rank(larger) >= mean_largest_rank(sequences) - 1e-9


def demand_of(adapter: AdapterRef, decode_tokens_per_s: float) -> AdapterDemand:
    return AdapterDemand(
        version=adapter.version,
        name=adapter.name,
        rank=adapter.rank,
        prefill_tokens_per_s=0.0,
        decode_tokens_per_s=decode_tokens_per_s,
        requests_per_s=decode_tokens_per_s / 100,
        forecast_tokens_per_s=decode_tokens_per_s,
    )


def expected_rank(high_tokens_per_s: float, step_s: float = 0.05, copies: int = 1, runs: int = 0) -> float:
    """Return the expected rank of an engine with planned copies of LOW, in constant demand, and of HIGH.

    ``runs`` requests run with OTHER_HIGH, which the plan does not keep there.
    """
    held = (resident(LOW, True, 0), resident(HIGH, True, 0), resident(OTHER_HIGH, False, runs))
    loads = [engine_seen(f"e{n}", resident=held, decode_step_s=step_s) for n in range(copies)]
    demand = demand_of(LOW, 900.0 * copies), demand_of(HIGH, high_tokens_per_s)
    view = ClusterView()
    for sequence in (1, 2):  # The first picture tells where copies are.
        view.update(picture(*loads, sequence=sequence, demand=demand), now=100.0 + sequence)
    return view.engines["e0"].adapters.expected_rank


def test_a_rarely_requested_large_copy_hardly_raises_the_expected_rank() -> None:
    assert expected_rank(0.0) == pytest.approx(8.0)
    assert expected_rank(0.1) < 9
    assert expected_rank(1000.0) == pytest.approx(128.0)


def test_the_expected_rank_depends_on_step_time_and_number_of_copies() -> None:
    assert expected_rank(10.0, step_s=0.01) < expected_rank(10.0, step_s=0.1)
    assert expected_rank(10.0, copies=4) == pytest.approx(expected_rank(2.5))


@pytest.mark.parametrize("step_s", [0.0, float("inf"), float("nan"), -1.0])
def test_an_invalid_step_time_is_replaced_by_the_default(step_s: float) -> None:
    assert 8 < expected_rank(10.0, step_s=step_s) < 128


def test_without_known_demand_the_largest_planned_rank_is_expected() -> None:
    held = (resident(LOW, True, 0), resident(HIGH, True, 0))
    view = ClusterView()
    view.update(picture(engine_seen("e0", resident=held)), now=100.0)
    assert view.engines["e0"].adapters.expected_rank == 128


def test_running_requests_outside_the_plan_raise_the_expected_rank() -> None:
    one, several = expected_rank(0.0, runs=1), expected_rank(0.0, runs=16)
    assert 8 < one < 100, "the next of its kind still costs those that are there"
    assert several > 127, "they are widened already"


def test_without_planned_copies_no_rank_is_expected() -> None:
    view = ClusterView()
    held = (resident(HIGH, False, 3),)
    view.update(picture(engine_seen("e0", resident=held), demand=(demand_of(HIGH, 100.0),)), now=100.0)
    assert view.engines["e0"].adapters.expected_rank is None


def test_planned_copies_without_demand_have_expected_rank_0() -> None:
    view = ClusterView()
    held = (resident(LOW, True, 0),)
    view.update(picture(engine_seen("e0", resident=held), demand=(demand_of(LOW, 0.0),)), now=100.0)
    view.record_sent("e0", route_request(adapter=HIGH), now=100.0)
    assert view.prices(CostModel(lora="padded")).columns.usual_rank.tolist() == [0.0]


@pytest.mark.parametrize("rate", [float("nan"), float("inf")])
def test_demand_that_is_not_finite_is_ignored(rate: float) -> None:
    view = ClusterView()
    held = (resident(LOW, True, 0), resident(HIGH, True, 0))
    demand = demand_of(LOW, 900.0), demand_of(HIGH, rate)
    view.update(picture(engine_seen("e0", resident=held), demand=demand), now=100.0)
    assert view.requests_per_s == 9.0
    assert isinstance(
        route_by_prediction(RoutingContext(route_request(), view, None, CostModel(), Slo(10.0, 4.0), Random(0))),
        Candidates,
    )
