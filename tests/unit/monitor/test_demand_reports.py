"""The demand window with partial reports: versions not listed, new spans, restarts and lost reports."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.engine.schedule.report import IDLE_REPORTS, TokenCounts
from loraserve.messages import AdapterTokens, EngineStatistics
from loraserve.monitor.demand import SLOTS, DemandWindow
from loraserve.testing.reports import demand_rates, engine_statistics

WINDOW_S = 60.0
SLOT_S = WINDOW_S / SLOTS


def listed(now_s: float, incarnation: str = "i1", **tokens: tuple[int, int]) -> tuple[EngineStatistics, float]:
    """Return a report that lists versions as (prefill tokens, span)."""
    counted = (AdapterTokens(version=v, prefill_tokens=n, decode_tokens=0, span=s) for v, (n, s) in tokens.items())
    return engine_statistics("e0", incarnation=incarnation, adapter_tokens=tuple(counted)), now_s


def test_a_version_that_is_not_listed_is_unchanged() -> None:
    window = DemandWindow(WINDOW_S)
    for report in (listed(0.0, a=(100, 0)), listed(1.0), listed(2.0, b=(7, 0)), listed(10.0, a=(150, 0))):
        window.report(*report)
    assert demand_rates(window, 10.0)["a"].prefill_tokens == pytest.approx(5.0)


def test_a_version_in_a_new_span_counts_from_zero() -> None:
    window = DemandWindow(WINDOW_S)
    for report in (listed(0.0, a=(100, 1)), listed(1.0), listed(10.0, a=(150, 2))):
        window.report(*report)
    assert demand_rates(window, 10.0)["a"].prefill_tokens == pytest.approx(15.0)


def test_a_new_span_is_noticed_even_if_the_reports_between_were_lost() -> None:
    window = DemandWindow(WINDOW_S)
    for report in (listed(0.0, a=(100, 1)), listed(10.0, a=(150, 2))):
        window.report(*report)
    assert demand_rates(window, 10.0)["a"].prefill_tokens == pytest.approx(15.0)


def test_a_new_monitor_does_not_count_old_tokens_as_demand() -> None:
    window = DemandWindow(WINDOW_S)
    # The engine lists adapters that were active lately and has forgotten the others.
    for report in (listed(0.0, a=(10**6, 1)), listed(5.0, a=(10**6, 1), b=(30, 9)), listed(10.0, b=(50, 9))):
        window.report(*report)
    assert {v: r.prefill_tokens for v, r in demand_rates(window, 10.0).items()} == {"b": 5.0}


def test_a_restarted_engine_starts_its_spans_again() -> None:
    window = DemandWindow(WINDOW_S)
    for report in (listed(0.0, a=(100, 1)), listed(1.0), listed(10.0, "i2", a=(150, 1))):
        window.report(*report)
    assert demand_rates(window, 10.0)["a"].prefill_tokens == pytest.approx(15.0)


@settings(max_examples=60, deadline=None)
@given(
    work=st.lists(
        st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 50), st.integers(0, 3), st.booleans()), max_size=60
    ),
    random=st.randoms(use_true_random=False),
)
def test_every_token_is_counted_once_despite_lost_reports_and_forgotten_versions(
    work: list[tuple[str, int, int, bool]], random: Random
) -> None:
    window, counts, done = DemandWindow(WINDOW_S), TokenCounts(), Counter[str]()
    window.report(engine_statistics("e0"), 0.0)
    lost = 0
    for number, (version, tokens, idle_bursts, decode) in enumerate(work):
        now = 0.01 * number
        if tokens:
            counts.count_tokens(version, tokens, decode)
            done[version] += tokens
        for _ in range(1 + IDLE_REPORTS // 2 * idle_bursts):
            if lost == IDLE_REPORTS or random.random() < 0.5:
                window.report(engine_statistics("e0", adapter_tokens=counts.by_adapter()), now)
                lost = 0
            else:
                lost += 1
            counts.mark_reported()
    window.report(engine_statistics("e0", adapter_tokens=counts.by_adapter()), 1.0)
    found = {v: round((r.prefill_tokens + r.decode_tokens) * SLOT_S) for v, r in demand_rates(window, 1.0).items()}
    assert found == dict(done)
