"""Demand from counters: rates over a window, restarts, what is expected next."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.messages import AdapterDemand, AdapterRef, AdapterTokens, EngineStatistics
from loraserve.monitor.demand import SLOTS, DemandWindow, Rates
from loraserve.testing.reports import adapter_ref, engine_statistics

WINDOW_S = 60.0
SLOT_S = WINDOW_S / SLOTS
PIRATE = adapter_ref(1)
V = PIRATE.version


def counted(
    prefill: int, decode: int = 0, requests: int = 0, engine: str = "e0", incarnation: str = "i1", version: str = V
) -> EngineStatistics:
    """A report whose counters for one version stand at this."""
    tokens = AdapterTokens(version=version, prefill_tokens=prefill, decode_tokens=decode, requests=requests)
    return engine_statistics(engine, incarnation=incarnation, adapter_tokens=(tokens,))


class Steady:
    """Engines whose counters grow evenly, reported once a second."""

    def __init__(self, *engines: str) -> None:
        self.window = DemandWindow(WINDOW_S)
        self.engines = engines
        self.now = 0.0
        self.total = 0

    def run(self, seconds: int, tokens_per_s: int) -> None:
        for _ in range(seconds):
            for engine in self.engines:
                self.window.report(counted(self.total, engine=engine), self.now)
            self.now += 1.0
            self.total += tokens_per_s

    @property
    def forecast(self) -> float:
        (demand,) = self.window.demand(self.now, {V: PIRATE}) or (None,)
        return demand.forecast_tokens_per_s if demand else 0.0


def test_nothing_reported_is_no_demand() -> None:
    window = DemandWindow(WINDOW_S)
    assert window.rates(10.0) == {}
    assert window.demand(10.0, {V: PIRATE}) == ()


def test_rates_are_differences_over_time() -> None:
    window = DemandWindow(WINDOW_S)
    window.report(counted(0), 0.0)
    window.report(counted(300, 600, 30), 20.0)
    assert window.rates(30.0) == {V: Rates(prefill_tokens=10.0, decode_tokens=20.0, requests=1.0)}


def test_what_was_counted_before_the_monitor_began_is_no_demand_of_now() -> None:
    window = DemandWindow(WINDOW_S)
    window.report(counted(1_000_000, 1_000_000, 1000), 0.0)
    window.report(counted(1_000_100, 1_000_000, 1000), 10.0)
    assert window.rates(10.0)[V] == Rates(prefill_tokens=10.0)


def test_an_adapter_that_is_new_at_an_engine_counts_from_zero() -> None:
    window = DemandWindow(WINDOW_S)
    window.report(engine_statistics("e0"), 0.0)
    window.report(counted(100), 10.0)
    assert window.rates(10.0)[V].prefill_tokens == pytest.approx(10.0)


def test_a_restarted_engine_counts_from_zero_again() -> None:
    window = DemandWindow(WINDOW_S)
    window.report(counted(5000), 0.0)
    window.report(counted(5100), 5.0)
    window.report(counted(100, incarnation="i2"), 10.0)
    assert window.rates(10.0)[V].prefill_tokens == pytest.approx(20.0)


def test_engines_and_versions_are_added_up_apart() -> None:
    window = DemandWindow(WINDOW_S)
    for total, now in ((0, 0.0), (100, 10.0)):
        window.report(counted(total, engine="e0"), now)
        window.report(counted(2 * total, engine="e1"), now)
        window.report(counted(5 * total, engine="e2", version=""), now)
    assert {v: r.prefill_tokens for v, r in window.rates(10.0).items()} == {V: 30.0, "": 50.0}


def test_one_burst_in_the_first_moment_is_not_taken_for_a_rate_per_moment() -> None:
    window = DemandWindow(WINDOW_S)
    window.report(counted(0), 0.0)
    window.report(counted(100), 0.01)
    assert window.rates(0.01)[V].prefill_tokens == pytest.approx(100 / SLOT_S)


def test_demand_older_than_the_window_is_gone() -> None:
    window = DemandWindow(WINDOW_S)
    window.report(counted(0), 0.0)
    window.report(counted(6000), 1.0)
    assert window.rates(WINDOW_S - SLOT_S)[V].prefill_tokens > 0
    assert window.rates(WINDOW_S + SLOT_S).get(V, Rates()) == Rates()


def test_a_steady_stream_is_seen_at_its_rate_and_expected_to_go_on() -> None:
    steady = Steady("e0", "e1")
    steady.run(300, tokens_per_s=50)
    assert steady.window.rates(steady.now)[V].prefill_tokens == pytest.approx(100.0, rel=1 / SLOTS)
    assert steady.forecast == pytest.approx(100.0, rel=0.05)


def test_growing_demand_is_expected_to_grow() -> None:
    steady = Steady("e0")
    for rate in range(0, 200, 10):
        steady.run(int(SLOT_S), rate)
    mean = steady.window.rates(steady.now)[V].prefill_tokens
    assert mean < 180
    assert steady.forecast == pytest.approx(200.0, rel=0.05)


def test_demand_that_ended_is_expected_less_and_less_and_then_forgotten() -> None:
    steady = Steady("e0")
    steady.run(120, tokens_per_s=100)
    expected = [steady.forecast]
    for _ in range(4):
        steady.run(10, tokens_per_s=0)
        expected.append(steady.forecast)
    assert expected == sorted(expected, reverse=True)
    assert expected[-1] < expected[0] / 4
    steady.run(600, tokens_per_s=0)
    assert steady.window.demand(steady.now, {V: PIRATE}) == ()


def test_a_silent_cluster_forgets_too() -> None:
    steady = Steady("e0")
    steady.run(120, tokens_per_s=100)
    assert steady.window.demand(steady.now + 3600.0, {V: PIRATE}) == ()


def test_demand_names_what_is_registered_and_keeps_what_is_not() -> None:
    window = DemandWindow(WINDOW_S)
    for total, now in ((0, 0.0), (100, 10.0)):
        window.report(counted(total), now)
        window.report(counted(total, engine="e1", version="gone"), now)
    demand = window.demand(10.0, {V: PIRATE})
    assert [(d.version, d.name, d.rank) for d in demand] == [("gone", "", 0), (V, PIRATE.name, PIRATE.rank)]
    assert all(d.prefill_tokens_per_s == pytest.approx(10.0) for d in demand)


@settings(max_examples=80, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.floats(0.0, 30.0), st.sampled_from(["e0", "e1"]), st.integers(0, 1000), st.booleans()),
        max_size=40,
    )
)
def test_within_a_window_no_token_is_lost_or_counted_twice(steps: list[tuple[float, str, int, bool]]) -> None:
    window, now, done = DemandWindow(WINDOW_S), 0.0, [(0.0, 0)]
    totals, incarnations = {"e0": 0, "e1": 0}, {"e0": 0, "e1": 0}
    for engine in totals:
        window.report(counted(0, engine=engine, incarnation="i0"), now)
    for pause_s, engine, tokens, restarts in steps:
        now += pause_s
        if restarts:
            incarnations[engine] += 1
            totals[engine] = 0
        totals[engine] += tokens
        done.append((now, tokens))
        window.report(counted(totals[engine], engine=engine, incarnation=f"i{incarnations[engine]}"), now)
    rate = window.rates(now).get(V, Rates())
    seconds = max(min(WINDOW_S, now), SLOT_S)
    surely = sum(tokens for at_s, tokens in done if at_s > now - WINDOW_S + SLOT_S)
    at_most = sum(tokens for at_s, tokens in done if at_s >= now - WINDOW_S - 1e-6)
    assert surely - 1e-6 <= rate.prefill_tokens * seconds <= at_most + 1e-6
    assert all(d.forecast_tokens_per_s >= 0 for d in window.demand(now, {}))


def told(window: DemandWindow, now: float, adapters: dict[str, AdapterRef] | None = None) -> dict[str, AdapterDemand]:
    return {demand.version: demand for demand in window.demand(now, adapters or {})}


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(st.floats(0.0, 20.0), st.sampled_from("abc"), st.integers(0, 1000)), max_size=60))
def test_what_is_kept_is_what_would_be_made_anew(steps: list[tuple[float, str, int]]) -> None:
    window, now, totals = DemandWindow(WINDOW_S, 30.0), 0.0, dict.fromkeys("abc", 0)
    window.report(engine_statistics("e0"), now)
    adapters = {"a": adapter_ref(1)}
    for pause_s, version, tokens in steps:
        now += pause_s
        totals[version] += tokens
        window.report(counted(totals[version], 2 * totals[version], version=version), now)
        demands = window.demand(now, adapters)
        assert [demand.version for demand in demands] == sorted({demand.version for demand in demands})
        rates = window.rates(now)
        assert rates.keys() <= {demand.version for demand in demands}
        for demand in demands:
            rate = rates.get(demand.version, Rates())
            assert (demand.prefill_tokens_per_s, demand.decode_tokens_per_s) == (
                rate.prefill_tokens,
                rate.decode_tokens,
            )
            assert demand.forecast_tokens_per_s >= 0
            assert demand.forecast_std_tokens_per_s >= 0
    assert window.demand(now + 3 * 3600.0, adapters) == ()


def test_an_adapter_that_is_registered_later_is_named_from_then_on() -> None:
    window = DemandWindow(WINDOW_S)
    window.report(counted(0), 0.0)
    window.report(counted(6000), 2 * WINDOW_S)
    assert told(window, 2 * WINDOW_S)[V].name == ""
    assert told(window, 2 * WINDOW_S, {V: PIRATE})[V].name == PIRATE.name


def test_demand_that_did_not_change_is_not_made_again() -> None:
    window = DemandWindow(WINDOW_S)
    for now in (0.0, 2 * WINDOW_S):
        for version in ("a", "b"):
            window.report(counted(int(now), engine=version, version=version), now)
    before = told(window, 2 * WINDOW_S)
    window.report(counted(500, engine="a", version="a"), 2 * WINDOW_S + 1)
    after = told(window, 2 * WINDOW_S + 1)
    assert after["b"] is before["b"]
    assert after["a"].prefill_tokens_per_s > before["a"].prefill_tokens_per_s


def test_the_forecast_reaches_over_the_planners_interval() -> None:
    near, far = Steady("e0"), Steady("e0")
    far.window = DemandWindow(WINDOW_S, horizon_s=60.0)
    for steady in (near, far):
        for rate in range(0, 600, 10):
            steady.run(int(SLOT_S), rate)
    assert near.forecast == pytest.approx(600.0, rel=0.03)
    assert far.forecast == pytest.approx(600.0 + 10 * (SLOTS - 1) / 2, rel=0.03)


def test_the_std_is_what_forecasts_were_off_by() -> None:
    steady = Steady("e0")
    steady.run(300, tokens_per_s=100)
    calm = told(steady.window, steady.now)[V].forecast_std_tokens_per_s
    for rate in (0, 200) * 20:
        steady.run(int(SLOT_S), rate)
    shaken = told(steady.window, steady.now)[V].forecast_std_tokens_per_s
    # A report's tokens fall into the piece in which it comes: a fifth of each piece is its neighbour's, so that 100 are
    # expected and 40 or 160 seen, in 40 of 100 pieces.
    assert calm < 5
    assert shaken == pytest.approx(60 * 0.4**0.5, rel=0.1)
