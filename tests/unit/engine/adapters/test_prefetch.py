"""Adapters that come before they are asked for: which, into whose room, for how long, and what it was good for."""

from types import SimpleNamespace

from loraserve.engine.adapters.prefetch import (
    ADMISSION_LASTS_S,
    LEAST_TIMES,
    MOST_CANDIDATES,
    SPARES_S,
    WINDOW_S,
    PrefetchKind,
)
from loraserve.engine.schedule.events import (
    CANCELLED,
    AdapterExpected,
    AdapterLoadFailed,
    CancelLoad,
    PlanPrepared,
    PlanReady,
    RequestAborted,
)
from loraserve.messages import PrefetchCounts


def expect(desk: SimpleNamespace, helpers: SimpleNamespace, version: str, units: int = 1) -> list[object]:
    told: list[object] = desk.tell(AdapterExpected(helpers.adapter(version, units)))
    return told


def ran(desk: SimpleNamespace, helpers: SimpleNamespace, *versions: str) -> None:
    """A request of each, one after another."""
    for version in versions:
        name = f"{version}-{desk.now}"
        desk.arrive(name, [1], helpers.adapter(version), max_tokens=1)
        while version in desk.loads:
            desk.loaded(version)
        while name not in desk.finish:
            desk.step_done()


def counts(desk: SimpleNamespace) -> dict[str, tuple[int, int, int]]:
    """Loaded, useful and wasted extents by kind."""
    found: tuple[PrefetchCounts, ...] = desk.scheduler.counters().prefetched
    return {c.kind: (c.loaded_bytes // 4096, c.useful_bytes // 4096, c.wasted_bytes // 4096) for c in found}


def test_what_is_expected_loads_and_is_there_for_its_request(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    expect(desk, helpers, "a")
    assert desk.loads == ["a"]
    assert desk.scheduler.is_idle
    desk.loaded("a")
    assert counts(desk) == {"admission": (1, 0, 0)}
    desk.arrive("r", [1], helpers.adapter("a"))
    assert desk.sizes == {"r": 1}
    assert counts(desk) == {"admission": (1, 1, 0)}


def test_who_comes_while_it_loads_takes_it_over(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    expect(desk, helpers, "a")
    desk.arrive("r", [1], helpers.adapter("a"))
    desk.now += 2 * ADMISSION_LASTS_S
    assert desk.tell(RequestAborted("other")) == [], "a request waits for it"
    assert desk.tell(RequestAborted("r")) == [CancelLoad("a")]


def test_what_nobody_came_for_is_given_up(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    expect(desk, helpers, "a")
    desk.now += ADMISSION_LASTS_S
    assert desk.tell(RequestAborted("other")) == [CancelLoad("a")]
    desk.tell(AdapterLoadFailed("a", CANCELLED, "nobody wants it any more"))
    assert desk.loads == []
    assert counts(desk) == {}, "nothing of it was ever there"


def test_one_that_is_expected_again_while_it_is_being_cancelled_loads_again(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("gone", [1], helpers.adapter("a"))
    desk.tell(RequestAborted("gone"))
    expect(desk, helpers, "a")
    desk.tell(AdapterLoadFailed("a", CANCELLED, "nobody wants it any more"))
    assert desk.loads == ["a"]


def test_a_guess_takes_no_room_that_a_request_or_the_plan_has_or_that_was_used_lately(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(pool_bytes=3 * helpers.UNIT)
    ran(desk, helpers, "old")
    desk.tell(PlanPrepared(1, (helpers.adapter("planned"),)))
    desk.loaded("planned")
    desk.arrive("runs", [1], helpers.adapter("busy"), max_tokens=9)
    desk.loaded("busy")
    ran(desk, helpers, "old")
    assert expect(desk, helpers, "a") == []
    desk.now += SPARES_S[PrefetchKind.ADMISSION]
    (evict, _) = expect(desk, helpers, "b")
    assert (evict.version, evict.slot) == ("old", 0)


def test_a_guess_takes_no_room_that_a_request_waits_for(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(pool_bytes=2 * helpers.UNIT)
    desk.arrive("runs", [1], helpers.adapter("busy"), max_tokens=9)
    desk.loaded("busy")
    desk.arrive("waits", [1], helpers.adapter("double", units=2))
    assert expect(desk, helpers, "a") == []
    desk.tell(RequestAborted("waits"))
    assert desk.loads == ["a"]


def test_requests_come_before_what_is_expected_and_that_before_the_plan(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(pool_bytes=8 * helpers.UNIT, max_loads=1)
    desk.arrive("first", [1], helpers.adapter("first"))
    desk.tell(PlanPrepared(1, (helpers.adapter("planned"),)))
    expect(desk, helpers, "expected")
    desk.arrive("second", [1], helpers.adapter("second"))
    order = []
    while desk.loads:
        (loading,) = desk.loads
        order.append(loading)
        desk.now -= 0.9
        desk.loaded(loading)
    assert order == ["first", "second", "expected", "planned"]


def test_what_cannot_be_had_is_not_tried_again(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    expect(desk, helpers, "a")
    desk.tell(AdapterLoadFailed("a", "not_found", "gone"))
    assert desk.loads == []
    assert expect(desk, helpers, "huge", units=9) == []
    assert desk.loads == []


def test_too_many_candidates_are_not_taken_up(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(pool_bytes=64 * helpers.UNIT, max_adapters=64)
    for number in range(MOST_CANDIDATES + 5):
        expect(desk, helpers, f"v{number}")
        desk.now -= 1.0
    begun = 0
    while desk.loads:
        begun += 1
        desk.now -= 1.0
        desk.loaded(desk.loads[0])
    assert begun == MOST_CANDIDATES


def learn(desk: SimpleNamespace, helpers: SimpleNamespace) -> None:
    """That b follows a; then c and d take their room."""
    for _ in range(LEAST_TIMES):
        desk.now += 10 * WINDOW_S
        ran(desk, helpers, "a")
        desk.now -= 1.0
        ran(desk, helpers, "b")
    desk.now += 10 * WINDOW_S
    ran(desk, helpers, "c", "d")


def test_what_usually_follows_is_there_before_it_is_asked_for(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    learn(desk, helpers)
    desk.now += SPARES_S[PrefetchKind.PATTERN]
    desk.arrive("leader", [1], helpers.adapter("a"), max_tokens=1)
    assert desk.loads == ["a"], "one place is left for whoever comes next"
    desk.loaded("a")
    assert desk.loads == ["b"]
    desk.loaded("b")
    ran(desk, helpers, "b")
    assert counts(desk) == {"pattern": (1, 1, 0)}
    assert any("expected: pattern" in line for line in desk.scheduler.story.lines("b"))


def test_what_usually_follows_makes_nothing_leave_that_was_used_lately(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    learn(desk, helpers)
    ran(desk, helpers, "a", "c")
    assert desk.loads == []


def test_what_a_plan_brought_in_is_counted_by_what_came_of_it(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.tell(PlanPrepared(1, (helpers.adapter("a"), helpers.adapter("b"))))
    desk.loaded("a")
    assert PlanReady(1, {}) in desk.loaded("b")
    ran(desk, helpers, "a")
    assert counts(desk) == {"plan": (2, 1, 0)}
    ran(desk, helpers, "c", "d")
    assert counts(desk) == {"plan": (2, 1, 1)}, "they left for what requests wanted"
    ran(desk, helpers, "a", "b")
    assert counts(desk) == {"plan": (2, 1, 1)}, "this time requests had waited for them"
