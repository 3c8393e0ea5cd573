"""Demand from token counters: rates over a window, restarts and forecasts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.messages import AdapterDemand, AdapterRef, AdapterTokens, EngineStatistics
from loraserve.monitor.demand import SLOTS, DemandWindow
from loraserve.testing.reports import DemandRates, adapter_ref, demand_rates, engine_statistics

WINDOW_S = 60.0
SLOT_S = WINDOW_S / SLOTS
PIRATE = adapter_ref(1)
V = PIRATE.version


def counted(
    prefill: int, decode: int = 0, requests: int = 0, engine: str = "e0", incarnation: str = "i1", version: str = V
) -> EngineStatistics:
    """Return a report with these counters for one version."""
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


def test_without_reports_there_is_no_demand() -> None:
    window = DemandWindow(WINDOW_S)
    assert demand_rates(window, 10.0) == {}
    assert window.demand(10.0, {V: PIRATE}) == ()


def test_rates_are_differences_over_time() -> None:
    window = DemandWindow(WINDOW_S)
    window.report(counted(0), 0.0)
    window.report(counted(300, 600, 30), 20.0)
    assert demand_rates(window, 30.0) == {V: DemandRates(prefill_tokens=10.0, decode_tokens=20.0, requests=1.0)}


def test_counts_from_before_the_monitor_started_are_no_demand() -> None:
    window = DemandWindow(WINDOW_S)
    window.report(counted(1_000_000, 1_000_000, 1000), 0.0)
    window.report(counted(1_000_100, 1_000_000, 1000), 10.0)
    assert demand_rates(window, 10.0)[V] == DemandRates(prefill_tokens=10.0)


def test_an_adapter_that_is_new_on_an_engine_counts_from_zero() -> None:
    window = DemandWindow(WINDOW_S)
    window.report(engine_statistics("e0"), 0.0)
    window.report(counted(100), 10.0)
    assert demand_rates(window, 10.0)[V].prefill_tokens == pytest.approx(10.0)


def test_a_restarted_engine_counts_from_zero_again() -> None:
    window = DemandWindow(WINDOW_S)
    window.report(counted(5000), 0.0)
    window.report(counted(5100), 5.0)
    window.report(counted(100, incarnation="i2"), 10.0)
    assert demand_rates(window, 10.0)[V].prefill_tokens == pytest.approx(20.0)


def test_versions_are_summed_separately_over_engines() -> None:
    window = DemandWindow(WINDOW_S)
    for total, now in ((0, 0.0), (100, 10.0)):
        window.report(counted(total, engine="e0"), now)
        window.report(counted(2 * total, engine="e1"), now)
        window.report(counted(5 * total, engine="e2", version=""), now)
    assert {v: r.prefill_tokens for v, r in demand_rates(window, 10.0).items()} == {V: 30.0, "": 50.0}


def test_a_burst_in_the_first_moment_is_averaged_over_a_slot() -> None:
    window = DemandWindow(WINDOW_S)
    window.report(counted(0), 0.0)
    window.report(counted(100), 0.01)
    assert demand_rates(window, 0.01)[V].prefill_tokens == pytest.approx(100 / SLOT_S)


def test_demand_older_than_the_window_expires() -> None:
    window = DemandWindow(WINDOW_S)
    window.report(counted(0), 0.0)
    window.report(counted(6000), 1.0)
    assert demand_rates(window, WINDOW_S - SLOT_S)[V].prefill_tokens > 0
    assert demand_rates(window, WINDOW_S + SLOT_S).get(V, DemandRates()) == DemandRates()


def test_steady_demand_is_measured_and_forecast_at_its_rate() -> None:
    steady = Steady("e0", "e1")
    steady.run(300, tokens_per_s=50)
    assert demand_rates(steady.window, steady.now)[V].prefill_tokens == pytest.approx(100.0, rel=1 / SLOTS)
    assert steady.forecast == pytest.approx(100.0, rel=0.05)


def test_the_forecast_of_growing_demand_grows() -> None:
    steady = Steady("e0")
    for rate in range(0, 200, 10):
        steady.run(int(SLOT_S), rate)
    mean = demand_rates(steady.window, steady.now)[V].prefill_tokens
    assert mean < 180
    assert steady.forecast == pytest.approx(200.0, rel=0.05)


def test_the_forecast_of_ended_demand_falls_and_is_then_forgotten() -> None:
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


def test_demand_is_forgotten_without_reports_too() -> None:
    steady = Steady("e0")
    steady.run(120, tokens_per_s=100)
    assert steady.window.demand(steady.now + 3600.0, {V: PIRATE}) == ()


def test_demand_has_the_names_of_registered_adapters_and_includes_others() -> None:
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
def test_no_token_in_the_window_is_lost_or_counted_twice(steps: list[tuple[float, str, int, bool]]) -> None:
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
    rate = demand_rates(window, now).get(V, DemandRates())
    seconds = max(min(WINDOW_S, now), SLOT_S)
    surely = sum(tokens for at_s, tokens in done if at_s > now - WINDOW_S + SLOT_S)
    at_most = sum(tokens for at_s, tokens in done if at_s >= now - WINDOW_S - 1e-6)
    assert surely - 1e-6 <= rate.prefill_tokens * seconds <= at_most + 1e-6
    assert all(d.forecast_tokens_per_s >= 0 for d in window.demand(now, {}))


def demand_by_version(
    window: DemandWindow, now: float, adapters: dict[str, AdapterRef] | None = None
) -> dict[str, AdapterDemand]:
    return {demand.version: demand for demand in window.demand(now, adapters or {})}


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(st.floats(0.0, 20.0), st.sampled_from("abc"), st.integers(0, 1000)), max_size=60))
def test_updated_sums_equal_recomputed_ones(steps: list[tuple[float, str, int]]) -> None:
    window, now, totals = DemandWindow(WINDOW_S, 30.0), 0.0, dict.fromkeys("abc", 0)
    window.report(engine_statistics("e0"), now)
    adapters = {"a": adapter_ref(1)}
    for pause_s, version, tokens in steps:
        now += pause_s
        totals[version] += tokens
        window.report(counted(totals[version], 2 * totals[version], version=version), now)
        demands = window.demand(now, adapters)
        assert [demand.version for demand in demands] == sorted({demand.version for demand in demands})
        assert demand_rates(window, now).keys() <= {demand.version for demand in demands}
        window._cached.clear()
        assert window.demand(now, adapters) == demands
        for demand in demands:
            assert demand.forecast_tokens_per_s >= 0
            assert demand.forecast_std_tokens_per_s >= 0
    assert window.demand(now + 3 * 3600.0, adapters) == ()


def test_an_adapter_that_is_registered_later_gets_its_name() -> None:
    window = DemandWindow(WINDOW_S)
    window.report(counted(0), 0.0)
    window.report(counted(6000), 2 * WINDOW_S)
    assert demand_by_version(window, 2 * WINDOW_S)[V].name == ""
    assert demand_by_version(window, 2 * WINDOW_S, {V: PIRATE})[V].name == PIRATE.name


def test_unchanged_demand_is_not_rebuilt() -> None:
    window = DemandWindow(WINDOW_S)
    for now in (0.0, 2 * WINDOW_S):
        for version in ("a", "b"):
            window.report(counted(int(now), engine=version, version=version), now)
    before = demand_by_version(window, 2 * WINDOW_S)
    window.report(counted(500, engine="a", version="a"), 2 * WINDOW_S + 1)
    after = demand_by_version(window, 2 * WINDOW_S + 1)
    assert after["b"] is before["b"]
    assert after["a"].prefill_tokens_per_s > before["a"].prefill_tokens_per_s


def test_the_forecast_is_of_the_planners_interval() -> None:
    near, far = Steady("e0"), Steady("e0")
    far.window = DemandWindow(WINDOW_S, horizon_s=60.0)
    for steady in (near, far):
        for rate in range(0, 600, 10):
            steady.run(int(SLOT_S), rate)
    assert near.forecast == pytest.approx(600.0, rel=0.03)
    assert far.forecast == pytest.approx(600.0 + 10 * (SLOTS - 1) / 2, rel=0.03)


def test_the_std_is_the_error_of_forecasts() -> None:
    steady = Steady("e0")
    steady.run(300, tokens_per_s=100)
    calm = demand_by_version(steady.window, steady.now)[V].forecast_std_tokens_per_s
    for rate in (0, 200) * 20:
        steady.run(int(SLOT_S), rate)
    shaken = demand_by_version(steady.window, steady.now)[V].forecast_std_tokens_per_s
    # A report's tokens count in the slot in which the report arrives, so a fifth of each slot's tokens count in the
    # next slot. In 40 of 100 slots 100 tokens are forecast and 40 or 160 are measured.
    assert calm < 5
    assert shaken == pytest.approx(60 * 0.4**0.5, rel=0.1)
