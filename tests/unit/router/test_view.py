"""What the router believes: reports, its own traffic on top, evidence of engines that do not answer."""

from collections.abc import Iterator
from itertools import count

import pytest

from loraserve.messages import AdapterRef, EngineLoad
from loraserve.router.engine_view import FIRST_AVOIDANCE_S, MAX_AVOIDANCE_S, TIMEOUTS_TO_AVOID, EngineView
from loraserve.router.view import (
    FORGET_MISSING_S,
    MAX_RUNNING,
    PENDING_TIMEOUT_S,
    REPORT_MARGIN_S,
    ClusterView,
)
from loraserve.story import MAX_SUBJECTS
from loraserve.testing.reports import MIB, adapter_ref, asked_for, engine_load, picture, resident, route_request

PIRATE = adapter_ref(1)


class Watcher:
    """A view whose pictures are numbered by themselves; valid after each step."""

    def __init__(self) -> None:
        self.view = ClusterView()
        self.now = 100.0
        self._sequence: Iterator[int] = count(1)

    def sees(self, *loads: EngineLoad, age_s: float = 0.0, dead: tuple[str, ...] = ()) -> None:
        self.view.update(picture(*loads, sequence=next(self._sequence), age_s=age_s, dead=dead), self.now)
        self.view.validate()

    def sends(self, request_id: str, engine: str = "e0", tokens: int = 10, adapter: AdapterRef | None = None) -> None:
        self.view.record_sent(engine, route_request(request_id, tokens, adapter), self.now)
        self.view.validate()

    def hears_nothing(self, engine: str = "e0", times: int = 1) -> None:
        for number in range(times):
            self.view.record_timeout(engine, f"lost{number}", self.now)
        self.view.validate()

    def passes(self, seconds: float) -> None:
        self.now += seconds
        self.view.expire_pending(self.now)
        self.view.validate()

    @property
    def e0(self) -> EngineView:
        return self.view.engines["e0"]


@pytest.fixture
def watcher() -> Watcher:
    watcher = Watcher()
    watcher.sees(engine_load("e0"))
    return watcher


def test_ready_engines_are_listed_by_name(watcher: Watcher) -> None:
    watcher.sees(engine_load("e2"), engine_load("e0"), engine_load("e1", state="DRAINING"), dead=("e2",))
    assert [v.name for v in watcher.view.ready_engines()] == ["e0"]


def test_what_is_on_its_way_to_an_engine_expires_also_where_that_took_no_requests_for_a_moment(
    watcher: Watcher,
) -> None:
    watcher.sees(engine_load("e0"), engine_load("e1"))
    watcher.sends("old", "e1")
    watcher.passes(0.9)
    watcher.sends("new", "e0")
    watcher.sees(engine_load("e0", state="STARTING"), engine_load("e1"), age_s=0.95)
    watcher.passes(0.2)
    watcher.sees(engine_load("e0"), engine_load("e1"), age_s=0.4)
    assert set(watcher.e0.pending) == {"new"}
    watcher.passes(PENDING_TIMEOUT_S)
    assert not watcher.e0.pending


def test_an_older_picture_changes_nothing(watcher: Watcher) -> None:
    watcher.view.update(picture(engine_load("e0", running=7), sequence=1), watcher.now)
    assert watcher.e0.load.running == 0


def test_a_restarted_monitor_counts_from_one_again(watcher: Watcher) -> None:
    watcher.sees(engine_load("e0", running=3))
    watcher.view.update(picture(engine_load("e0", running=7), sequence=1, incarnation="m2"), watcher.now)
    assert watcher.e0.load.running == 7


def test_what_is_sent_counts_as_load_at_once(watcher: Watcher) -> None:
    watcher.sends("r1", tokens=30, adapter=PIRATE)
    watcher.sends("r2", tokens=12)
    assert (watcher.e0.requests, watcher.e0.pending_tokens) == (2, 42)
    assert PIRATE.version in watcher.e0.pending_adapters.versions


def test_sending_again_counts_once(watcher: Watcher) -> None:
    watcher.sends("r1", tokens=30)
    watcher.sends("r2", tokens=1)
    watcher.sends("r1", tokens=30)
    assert (watcher.e0.requests, watcher.e0.pending_tokens) == (2, 31)


def test_a_report_that_mentions_a_request_counts_it_instead(watcher: Watcher) -> None:
    watcher.sends("r1", tokens=30)
    watcher.sees(engine_load("e0", waiting=1, waiting_prefill_tokens=30, request_ids=("r1",)))
    assert (watcher.e0.requests, watcher.e0.pending_tokens) == (1, 0)


def test_a_report_from_before_it_was_sent_leaves_it(watcher: Watcher) -> None:
    watcher.sends("r1")
    watcher.now += 0.2
    watcher.sees(engine_load("e0"), age_s=0.2)
    assert watcher.e0.requests == 1


def test_a_later_report_without_it_means_that_it_has_ended(watcher: Watcher) -> None:
    watcher.sends("r1")
    watcher.now += 0.2
    watcher.sees(engine_load("e0"), age_s=0.1)
    assert watcher.e0.requests == 0


def test_what_no_report_mentions_is_dropped_after_a_while(watcher: Watcher) -> None:
    watcher.sends("r1")
    watcher.passes(PENDING_TIMEOUT_S / 2)
    watcher.sends("r2")
    watcher.passes(PENDING_TIMEOUT_S * 0.6)
    assert list(watcher.e0.pending) == ["r2"]


def test_a_refused_request_is_no_load(watcher: Watcher) -> None:
    watcher.sends("r1")
    watcher.view.record_refused("e0", "r1", "overloaded", watcher.now)
    assert (watcher.e0.requests, watcher.e0.pending_tokens) == (0, 0)


def test_an_engine_that_restarted_has_none_of_what_was_sent_to_it(watcher: Watcher) -> None:
    watcher.sends("r1")
    watcher.hears_nothing(times=TIMEOUTS_TO_AVOID)
    watcher.sees(engine_load("e0", incarnation="i2"))
    assert watcher.e0.requests == 0
    assert watcher.e0.avoided_since_s is None


def test_an_answer_of_another_incarnation_means_an_empty_pool(watcher: Watcher) -> None:
    watcher.sees(engine_load("e0", resident=(resident(PIRATE),), loading=("v2",)))
    watcher.view.record_admitted("e0", "r1", "i1", watcher.now)
    assert watcher.e0.resident == {PIRATE.version}
    watcher.view.record_admitted("e0", "r2", "i2", watcher.now)
    assert not watcher.e0.resident
    assert "v2" not in watcher.e0.pending_adapters.versions | watcher.e0.loading


def test_room_is_what_the_engine_says_lies_in_one_piece(watcher: Watcher) -> None:
    held = (resident(adapter_ref(1, slab_bytes=3 * MIB), pinned=True), resident(adapter_ref(4, slab_bytes=2 * MIB)))
    loads = {"pool_total_bytes": 48 * MIB, "pool_free_bytes": 45 * MIB, "pool_room_bytes": 13 * MIB}
    watcher.sees(engine_load("e0", resident=held, **loads))
    assert watcher.e0.room_bytes == 13 * MIB
    assert watcher.e0.largest_extent_bytes == 48 * MIB


def test_one_timeout_is_no_reason_to_avoid(watcher: Watcher) -> None:
    watcher.hears_nothing(times=TIMEOUTS_TO_AVOID - 1)
    assert watcher.e0.avoided_since_s is None
    watcher.view.record_admitted("e0", "r1", "i1", watcher.now)
    watcher.hears_nothing(times=TIMEOUTS_TO_AVOID - 1)
    assert watcher.e0.avoided_since_s is None


def test_an_answer_ends_avoidance(watcher: Watcher) -> None:
    watcher.hears_nothing(times=TIMEOUTS_TO_AVOID)
    assert watcher.e0.avoided_since_s == watcher.now
    watcher.view.record_admitted("e0", "r1", "i1", watcher.now)
    assert watcher.e0.avoided_since_s is None


def test_reports_end_avoidance_only_after_a_while(watcher: Watcher) -> None:
    watcher.hears_nothing(times=TIMEOUTS_TO_AVOID)
    watcher.now += FIRST_AVOIDANCE_S * 0.9
    watcher.sees(engine_load("e0"))
    assert watcher.e0.avoided_since_s is not None
    watcher.now += FIRST_AVOIDANCE_S * 0.2
    watcher.sees(engine_load("e0"))
    assert watcher.e0.avoided_since_s is None


def test_each_avoidance_is_longer_up_to_a_limit(watcher: Watcher) -> None:
    lasted: list[float] = []
    watcher.hears_nothing(times=TIMEOUTS_TO_AVOID)
    for _ in range(6):
        began_s = watcher.now
        while watcher.e0.avoided_since_s is not None:
            watcher.now += 0.25
            watcher.sees(engine_load("e0"))
        lasted.append(watcher.now - began_s)
        watcher.hears_nothing()
        assert watcher.e0.avoided_since_s is not None, "one more timeout is enough after an avoidance"
    assert lasted == [0.5, 1.0, 2.0, 4.0, 8.0, MAX_AVOIDANCE_S]


def test_a_request_is_known_to_run_where_it_was_admitted(watcher: Watcher) -> None:
    watcher.view.record_admitted("e0", "r1", "i1", watcher.now)
    assert watcher.view.running["r1"].engine == "e0"
    watcher.now += 2 * REPORT_MARGIN_S
    watcher.sees(engine_load("e0", request_ids=("r1",)))
    assert watcher.view.running["r1"].engine == "e0"
    watcher.sees(engine_load("e0"))
    assert "r1" not in watcher.view.running


def test_a_restarted_router_learns_from_reports_what_runs_where(watcher: Watcher) -> None:
    watcher.sees(engine_load("e0"), engine_load("e1", request_ids=("r1", "r2")))
    assert {i: live.engine for i, live in watcher.view.running.items()} == {"r1": "e1", "r2": "e1"}


def test_nothing_runs_on_a_dead_engine(watcher: Watcher) -> None:
    watcher.sees(engine_load("e0", request_ids=("r1",)))
    watcher.sees(engine_load("e0", request_ids=("r1",)), dead=("e0",))
    assert not watcher.view.running


def test_a_young_monitor_that_has_not_heard_of_an_engine_does_not_end_it(watcher: Watcher) -> None:
    watcher.now += FORGET_MISSING_S / 2
    watcher.sees(engine_load("e1"))
    assert [v.name for v in watcher.view.ready_engines()] == ["e0", "e1"]
    watcher.now += FORGET_MISSING_S
    watcher.sees(engine_load("e1"))
    assert list(watcher.view.engines) == ["e1"]


def test_the_mean_output_follows_demand(watcher: Watcher) -> None:
    before = watcher.view.mean_output_tokens
    demand = (asked_for(PIRATE, decode_tokens_per_s=30.0), asked_for(adapter_ref(2), decode_tokens_per_s=10.0))
    watcher.view.update(picture(engine_load("e0"), sequence=9, demand=demand), watcher.now)
    assert watcher.view.mean_output_tokens == pytest.approx(50.0)
    watcher.view.update(picture(engine_load("e0"), sequence=10), watcher.now)
    assert watcher.view.mean_output_tokens == pytest.approx(50.0) != before


def test_what_happens_at_an_unknown_engine_does_not_matter(watcher: Watcher) -> None:
    watcher.sends("r1", "e9")
    watcher.view.record_refused("e9", "r1", "draining", watcher.now)
    watcher.hears_nothing("e9")
    watcher.view.record_admitted("e9", "r1", "i1", watcher.now)
    assert list(watcher.view.engines) == ["e0"]


def test_a_story_tells_what_was_done_with_a_request(watcher: Watcher) -> None:
    watcher.sends("r1")
    watcher.view.record_timeout("e0", "r1", watcher.now)
    watcher.view.record_refused("e1", "r1", "overloaded", watcher.now)
    watcher.view.record_admitted("e2", "r1", "i1", watcher.now + 1)
    assert watcher.view.story.lines("r1") == [
        "100.000 sent to e0",
        "100.000 no answer from e0",
        "100.000 refused by e1: overloaded",
        "101.000 admitted by e2",
    ]
    assert watcher.view.story.lines("r2") == []


def test_stories_and_live_requests_are_forgotten_oldest_first(watcher: Watcher) -> None:
    for number in range(MAX_SUBJECTS + 1):
        watcher.view.record_refused("e0", f"s{number}", "overloaded", watcher.now)
    assert not watcher.view.story.lines("s0")
    assert watcher.view.story.lines("s1")
    watcher.sees(engine_load("e0", request_ids=tuple(f"r{n}" for n in range(MAX_RUNNING + 1))))
    assert "r0" not in watcher.view.running
    assert f"r{MAX_RUNNING}" in watcher.view.running


def test_only_news_is_learned_from(watcher: Watcher) -> None:
    assert watcher.view.update(picture(engine_load("e0"), sequence=5), watcher.now)
    assert not watcher.view.update(picture(engine_load("e0"), sequence=5), watcher.now)
    assert not watcher.view.update(picture(engine_load("e0"), sequence=4), watcher.now)
