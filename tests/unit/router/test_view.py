"""The router's view: reports, its own traffic since, and engines that do not answer."""

from collections.abc import Iterator
from itertools import count

import pytest

from loraserve.messages import AdapterRef, EngineSeen
from loraserve.router.engine_view import FIRST_AVOIDANCE_S, MAX_AVOIDANCE_S, TIMEOUTS_TO_AVOID, EngineView
from loraserve.router.view import (
    FORGET_MISSING_S,
    MAX_RUNNING,
    PENDING_TIMEOUT_S,
    REPORT_MARGIN_S,
    ClusterView,
)
from loraserve.story import MAX_SUBJECTS
from loraserve.testing.reports import MIB, adapter_ref, asked_for, engine_seen, picture, resident, route_request

PIRATE = adapter_ref(1)


class TrackedView:
    """A view with numbered pictures that is validated after each step."""

    def __init__(self) -> None:
        self.view = ClusterView()
        self.now = 100.0
        self._sequence: Iterator[int] = count(1)

    def report(self, *loads: EngineSeen, age_s: float = 0.0, dead: tuple[str, ...] = ()) -> None:
        self.view.update(picture(*loads, sequence=next(self._sequence), age_s=age_s, dead=dead), self.now)
        self.view.validate()

    def send(self, request_id: str, engine: str = "e0", tokens: int = 10, adapter: AdapterRef | None = None) -> None:
        self.view.record_sent(engine, route_request(request_id, tokens, adapter), self.now)
        self.view.validate()

    def time_out(self, engine: str = "e0", times: int = 1) -> None:
        for number in range(times):
            self.view.record_timeout(engine, f"lost{number}", self.now)
        self.view.validate()

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.view.expire_pending(self.now)
        self.view.validate()

    @property
    def e0(self) -> EngineView:
        return self.view.engines["e0"]


@pytest.fixture
def tracked() -> TrackedView:
    tracked = TrackedView()
    tracked.report(engine_seen("e0"))
    return tracked


def test_ready_engines_are_listed_by_name(tracked: TrackedView) -> None:
    tracked.report(engine_seen("e2"), engine_seen("e0"), engine_seen("e1", state="DRAINING"), dead=("e2",))
    assert [v.name for v in tracked.view.ready_engines()] == ["e0"]


def test_pending_requests_expire_on_engines_that_were_not_ready_meanwhile(
    tracked: TrackedView,
) -> None:
    tracked.report(engine_seen("e0"), engine_seen("e1"))
    tracked.send("old", "e1")
    tracked.advance(0.9)
    tracked.send("new", "e0")
    tracked.report(engine_seen("e0", state="STARTING"), engine_seen("e1"), age_s=0.95)
    tracked.advance(0.2)
    tracked.report(engine_seen("e0"), engine_seen("e1"), age_s=0.4)
    assert set(tracked.e0.pending) == {"new"}
    tracked.advance(PENDING_TIMEOUT_S)
    assert not tracked.e0.pending


def test_an_older_picture_changes_nothing(tracked: TrackedView) -> None:
    tracked.view.update(picture(engine_seen("e0", running=7), sequence=1), tracked.now)
    assert tracked.e0.load.queue.running == 0


def test_a_restarted_monitor_counts_from_one_again(tracked: TrackedView) -> None:
    tracked.report(engine_seen("e0", running=3))
    tracked.view.update(picture(engine_seen("e0", running=7), sequence=1, incarnation="m2"), tracked.now)
    assert tracked.e0.load.queue.running == 7


def test_a_sent_request_counts_as_load_at_once(tracked: TrackedView) -> None:
    tracked.send("r1", tokens=30, adapter=PIRATE)
    tracked.send("r2", tokens=12)
    assert (tracked.e0.requests, tracked.e0.pending_tokens) == (2, 42)
    assert PIRATE.version in tracked.e0.pending_adapters.versions


def test_a_request_that_is_sent_again_counts_once(tracked: TrackedView) -> None:
    tracked.send("r1", tokens=30)
    tracked.send("r2", tokens=1)
    tracked.send("r1", tokens=30)
    assert (tracked.e0.requests, tracked.e0.pending_tokens) == (2, 31)


def test_a_report_that_mentions_a_pending_request_replaces_it(tracked: TrackedView) -> None:
    tracked.send("r1", tokens=30)
    tracked.report(engine_seen("e0", waiting=1, waiting_prefill_tokens=30, request_ids=("r1",)))
    assert (tracked.e0.requests, tracked.e0.pending_tokens) == (1, 0)


def test_an_older_report_leaves_a_pending_request(tracked: TrackedView) -> None:
    tracked.send("r1")
    tracked.now += 0.2
    tracked.report(engine_seen("e0"), age_s=0.2)
    assert tracked.e0.requests == 1


def test_a_later_report_without_the_request_ends_it(tracked: TrackedView) -> None:
    tracked.send("r1")
    tracked.now += 0.2
    tracked.report(engine_seen("e0"), age_s=0.1)
    assert tracked.e0.requests == 0


def test_a_request_that_no_report_mentions_expires(tracked: TrackedView) -> None:
    tracked.send("r1")
    tracked.advance(PENDING_TIMEOUT_S / 2)
    tracked.send("r2")
    tracked.advance(PENDING_TIMEOUT_S * 0.6)
    assert list(tracked.e0.pending) == ["r2"]


def test_a_refused_request_does_not_count_as_load(tracked: TrackedView) -> None:
    tracked.send("r1")
    tracked.view.record_refused("e0", "r1", "overloaded", tracked.now)
    assert (tracked.e0.requests, tracked.e0.pending_tokens) == (0, 0)


def test_a_restarted_engine_has_no_pending_requests(tracked: TrackedView) -> None:
    tracked.send("r1")
    tracked.time_out(times=TIMEOUTS_TO_AVOID)
    tracked.report(engine_seen("e0", incarnation="i2"))
    assert tracked.e0.requests == 0
    assert tracked.e0.avoided_since_s is None


def test_an_answer_of_another_incarnation_clears_the_adapters(tracked: TrackedView) -> None:
    tracked.report(engine_seen("e0", resident=(resident(PIRATE),), loading=("v2",)))
    tracked.view.record_admitted("e0", "r1", "i1", tracked.now)
    assert tracked.e0.resident == {PIRATE.version}
    tracked.view.record_admitted("e0", "r2", "i2", tracked.now)
    assert not tracked.e0.resident
    assert "v2" not in tracked.e0.pending_adapters.versions | tracked.e0.loading


def test_room_is_the_largest_free_extent_of_the_report(tracked: TrackedView) -> None:
    held = (resident(adapter_ref(1, slab_bytes=3 * MIB), pinned=True), resident(adapter_ref(4, slab_bytes=2 * MIB)))
    loads = {"pool_bytes": 48 * MIB, "pool_free_bytes": 45 * MIB, "pool_room_bytes": 13 * MIB}
    tracked.report(engine_seen("e0", resident=held, **loads))
    assert tracked.e0.room_bytes == 13 * MIB
    assert tracked.e0.largest_extent_bytes == 48 * MIB


def test_a_single_timeout_does_not_cause_avoidance(tracked: TrackedView) -> None:
    tracked.time_out(times=TIMEOUTS_TO_AVOID - 1)
    assert tracked.e0.avoided_since_s is None
    tracked.view.record_admitted("e0", "r1", "i1", tracked.now)
    tracked.time_out(times=TIMEOUTS_TO_AVOID - 1)
    assert tracked.e0.avoided_since_s is None


def test_an_answer_ends_avoidance(tracked: TrackedView) -> None:
    tracked.time_out(times=TIMEOUTS_TO_AVOID)
    assert tracked.e0.avoided_since_s == tracked.now
    tracked.view.record_admitted("e0", "r1", "i1", tracked.now)
    assert tracked.e0.avoided_since_s is None


def test_reports_end_avoidance_only_after_its_time(tracked: TrackedView) -> None:
    tracked.time_out(times=TIMEOUTS_TO_AVOID)
    tracked.now += FIRST_AVOIDANCE_S * 0.9
    tracked.report(engine_seen("e0"))
    assert tracked.e0.avoided_since_s is not None
    tracked.now += FIRST_AVOIDANCE_S * 0.2
    tracked.report(engine_seen("e0"))
    assert tracked.e0.avoided_since_s is None


def test_each_avoidance_is_longer_up_to_a_limit(tracked: TrackedView) -> None:
    lasted: list[float] = []
    tracked.time_out(times=TIMEOUTS_TO_AVOID)
    for _ in range(6):
        began_s = tracked.now
        while tracked.e0.avoided_since_s is not None:
            tracked.now += 0.25
            tracked.report(engine_seen("e0"))
        lasted.append(tracked.now - began_s)
        tracked.time_out()
        assert tracked.e0.avoided_since_s is not None, "one more timeout is enough after an avoidance"
    assert lasted == [0.5, 1.0, 2.0, 4.0, 8.0, MAX_AVOIDANCE_S]


def test_an_admitted_request_is_known_to_run_there(tracked: TrackedView) -> None:
    tracked.view.record_admitted("e0", "r1", "i1", tracked.now)
    assert tracked.view.running["r1"].engine == "e0"
    tracked.now += 2 * REPORT_MARGIN_S
    tracked.report(engine_seen("e0", request_ids=("r1",)))
    assert tracked.view.running["r1"].engine == "e0"
    tracked.report(engine_seen("e0"))
    assert "r1" not in tracked.view.running


def test_a_restarted_router_learns_running_requests_from_reports(tracked: TrackedView) -> None:
    tracked.report(engine_seen("e0"), engine_seen("e1", request_ids=("r1", "r2")))
    assert {i: live.engine for i, live in tracked.view.running.items()} == {"r1": "e1", "r2": "e1"}


def test_requests_of_a_dead_engine_are_dropped(tracked: TrackedView) -> None:
    tracked.report(engine_seen("e0", request_ids=("r1",)))
    tracked.report(engine_seen("e0", request_ids=("r1",)), dead=("e0",))
    assert not tracked.view.running


def test_an_engine_missing_from_a_restarted_monitors_picture_is_kept_for_a_while(tracked: TrackedView) -> None:
    tracked.now += FORGET_MISSING_S / 2
    tracked.report(engine_seen("e1"))
    assert [v.name for v in tracked.view.ready_engines()] == ["e0", "e1"]
    tracked.now += FORGET_MISSING_S
    tracked.report(engine_seen("e1"))
    assert list(tracked.view.engines) == ["e1"]


def test_the_mean_output_is_computed_from_demand(tracked: TrackedView) -> None:
    before = tracked.view.mean_output_tokens
    demand = (asked_for(PIRATE, decode_tokens_per_s=30.0), asked_for(adapter_ref(2), decode_tokens_per_s=10.0))
    tracked.view.update(picture(engine_seen("e0"), sequence=9, demand=demand), tracked.now)
    assert tracked.view.mean_output_tokens == pytest.approx(50.0)
    tracked.view.update(picture(engine_seen("e0"), sequence=10), tracked.now)
    assert tracked.view.mean_output_tokens == pytest.approx(50.0) != before


def test_events_of_an_unknown_engine_change_nothing(tracked: TrackedView) -> None:
    tracked.send("r1", "e9")
    tracked.view.record_refused("e9", "r1", "draining", tracked.now)
    tracked.time_out("e9")
    tracked.view.record_admitted("e9", "r1", "i1", tracked.now)
    assert list(tracked.view.engines) == ["e0"]


def test_a_story_lists_what_was_done_with_a_request(tracked: TrackedView) -> None:
    tracked.send("r1")
    tracked.view.record_timeout("e0", "r1", tracked.now)
    tracked.view.record_refused("e1", "r1", "overloaded", tracked.now)
    tracked.view.record_admitted("e2", "r1", "i1", tracked.now + 1)
    assert tracked.view.story.lines("r1") == [
        "100.000 sent to e0",
        "100.000 no answer from e0",
        "100.000 refused by e1: overloaded",
        "101.000 admitted by e2",
    ]
    assert tracked.view.story.lines("r2") == []


def test_stories_and_live_requests_are_forgotten_oldest_first(tracked: TrackedView) -> None:
    for number in range(MAX_SUBJECTS + 1):
        tracked.view.record_refused("e0", f"s{number}", "overloaded", tracked.now)
    assert not tracked.view.story.lines("s0")
    assert tracked.view.story.lines("s1")
    tracked.report(engine_seen("e0", request_ids=tuple(f"r{n}" for n in range(MAX_RUNNING + 1))))
    assert "r0" not in tracked.view.running
    assert f"r{MAX_RUNNING}" in tracked.view.running


def test_update_returns_whether_the_picture_was_new(tracked: TrackedView) -> None:
    assert tracked.view.update(picture(engine_seen("e0"), sequence=5), tracked.now)
    assert not tracked.view.update(picture(engine_seen("e0"), sequence=5), tracked.now)
    assert not tracked.view.update(picture(engine_seen("e0"), sequence=4), tracked.now)
