"""Which engines are alive, by the age of their reports."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.messages import EngineSeen
from loraserve.monitor.liveness import FORGET_AFTER_S, Liveness
from loraserve.testing.reports import engine_seen

DEAD_AFTER_S = 1.5


@pytest.fixture
def liveness() -> Liveness:
    return Liveness(DEAD_AFTER_S)


def alive(liveness: Liveness, now: float) -> dict[str, bool]:
    return {seen.load.engine: seen.alive for seen in liveness.engines(now)}


def report(liveness: Liveness, seen: EngineSeen, now: float) -> bool:
    return liveness.report(seen.load, seen.capabilities, now)


def test_no_engine_is_known_at_first(liveness: Liveness) -> None:
    assert liveness.engines(0.0) == ()
    assert liveness.next_death_s(0.0) is None


def test_an_engine_is_alive_while_its_last_report_is_recent(liveness: Liveness) -> None:
    report(liveness, engine_seen("e1"), 10.0)
    report(liveness, engine_seen("e0"), 11.0)
    assert alive(liveness, 11.5) == {"e0": True, "e1": True}
    assert alive(liveness, 11.6) == {"e0": True, "e1": False}
    assert [seen.age_s for seen in liveness.engines(12.0)] == [1.0, 2.0]


def test_an_ended_engine_is_dead_at_once_until_it_reports_again(liveness: Liveness) -> None:
    seen = engine_seen("e0")
    report(liveness, seen, 10.0)
    assert not liveness.end("e0", "another incarnation")
    assert not liveness.has_ended("e0", seen.load.incarnation)
    assert liveness.end("e0", seen.load.incarnation)
    assert liveness.has_ended("e0", seen.load.incarnation)
    assert alive(liveness, 10.1) == {"e0": False}
    assert [engine.ended for engine in liveness.engines(10.1)] == [True]
    assert liveness.next_death_s(10.1) is None
    assert report(liveness, seen, 10.2), "it was dead"
    assert alive(liveness, 10.2) == {"e0": True}
    assert liveness.has_ended("e0", "an earlier incarnation")


def test_the_last_report_counts(liveness: Liveness) -> None:
    for running in range(3):
        report(liveness, engine_seen("e0", running=running), 10.0 + running)
    (seen,) = liveness.engines(12.0)
    assert (seen.load.queue.running, seen.age_s) == (2, 0.0)


def test_a_report_is_news_if_the_engine_is_new_back_restarted_or_in_another_state(liveness: Liveness) -> None:
    assert report(liveness, engine_seen("e0"), 10.0)
    assert not report(liveness, engine_seen("e0", running=5), 11.0)
    assert report(liveness, engine_seen("e0"), 11.0 + DEAD_AFTER_S + 0.1), "it had been dead"
    assert report(liveness, engine_seen("e0", incarnation="i2"), 12.7)
    assert report(liveness, engine_seen("e0", incarnation="i2", state="DRAINING"), 12.8)
    assert report(liveness, engine_seen("e1"), 12.8)


def test_a_draining_engine_is_alive(liveness: Liveness) -> None:
    report(liveness, engine_seen("e0", state="DRAINING"), 10.0)
    assert alive(liveness, 10.5) == {"e0": True}


def test_silent_engines_are_forgotten_and_count_as_new_when_they_return(liveness: Liveness) -> None:
    report(liveness, engine_seen("e0"), 10.0)
    assert alive(liveness, 10.0 + FORGET_AFTER_S) == {"e0": False}
    assert alive(liveness, 10.1 + FORGET_AFTER_S) == {}
    assert report(liveness, engine_seen("e0"), 11.0 + FORGET_AFTER_S)


def test_the_next_death_is_that_of_the_oldest_report_of_a_live_engine(liveness: Liveness) -> None:
    report(liveness, engine_seen("dead"), 1.0)
    report(liveness, engine_seen("e0"), 10.0)
    report(liveness, engine_seen("e1"), 10.5)
    assert liveness.next_death_s(11.0) == pytest.approx(0.5)
    assert liveness.next_death_s(11.6) == pytest.approx(0.4)
    assert liveness.next_death_s(13.0) is None


@settings(max_examples=100, deadline=None)
@given(reports=st.lists(st.tuples(st.sampled_from(["e0", "e1", "e2"]), st.floats(0.0, 2.0)), min_size=1, max_size=20))
def test_an_engine_is_dead_when_the_next_death_was_due(reports: list[tuple[str, float]]) -> None:
    liveness, now = Liveness(DEAD_AFTER_S), 100.0
    for engine, pause_s in reports:
        now += pause_s
        report(liveness, engine_seen(engine), now)
    living = sum(alive(liveness, now).values())
    while (wait_s := liveness.next_death_s(now)) is not None:
        if wait_s > 0.01:
            assert sum(alive(liveness, now + wait_s - 0.001).values()) == living, "an engine died earlier"
        now += wait_s + 0.001
        left = sum(alive(liveness, now).values())
        assert left < living, "no engine died"
        living = left
    assert living == 0
