"""Prefetched adapters: which are loaded, into whose room, for how long, and how useful they were."""

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
    CopiesRequested,
    PlanReady,
    RequestAborted,
)
from loraserve.messages import PrefetchCounts


def expect(desk: SimpleNamespace, helpers: SimpleNamespace, version: str, units: int = 1) -> list[object]:
    told: list[object] = desk.tell(AdapterExpected(helpers.adapter(version, units)))
    return told


def ran(desk: SimpleNamespace, helpers: SimpleNamespace, *versions: str) -> None:
    """Run a request for each adapter, one after another."""
    for version in versions:
        name = f"{version}-{desk.now}"
        desk.arrive(name, [1], helpers.adapter(version), max_tokens=1)
        while version in desk.loads:
            desk.loaded(version)
        while name not in desk.finish:
            desk.step_done()


def counts(desk: SimpleNamespace) -> dict[str, tuple[int, int, int]]:
    """Return loaded, useful and wasted extents by kind."""
    found: tuple[PrefetchCounts, ...] = desk.scheduler.counters().prefetched
    return {c.kind: (c.loaded_bytes // 4096, c.useful_bytes // 4096, c.wasted_bytes // 4096) for c in found}


def test_an_expected_adapter_is_resident_when_its_request_comes(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    expect(desk, helpers, "a")
    assert desk.loads == ["a"]
    assert desk.scheduler.is_idle
    desk.loaded("a")
    assert counts(desk) == {"admission": (1, 0, 0)}
    desk.arrive("r", [1], helpers.adapter("a"))
    assert desk.sizes == {"r": 1}
    assert counts(desk) == {"admission": (1, 1, 0)}


def test_a_request_that_comes_during_a_prefetch_keeps_the_load(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    expect(desk, helpers, "a")
    desk.arrive("r", [1], helpers.adapter("a"))
    desk.now += 2 * ADMISSION_LASTS_S
    assert desk.tell(RequestAborted("other")) == [], "a request waits for it"
    assert desk.tell(RequestAborted("r")) == [CancelLoad("a")]


def test_a_prefetch_without_a_request_is_cancelled_in_time(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    expect(desk, helpers, "a")
    desk.now += ADMISSION_LASTS_S
    assert desk.tell(RequestAborted("other")) == [CancelLoad("a")]
    desk.tell(AdapterLoadFailed("a", CANCELLED, "nobody wants it any more"))
    assert desk.loads == []
    assert counts(desk) == {}, "nothing of it was ever there"


def test_an_adapter_expected_again_during_its_cancellation_loads_again(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("gone", [1], helpers.adapter("a"))
    desk.tell(RequestAborted("gone"))
    expect(desk, helpers, "a")
    desk.tell(AdapterLoadFailed("a", CANCELLED, "nobody wants it any more"))
    assert desk.loads == ["a"]


def test_a_prefetch_evicts_nothing_in_use_pinned_or_used_lately(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(pool_bytes=3 * helpers.UNIT)
    ran(desk, helpers, "old")
    desk.tell(CopiesRequested(1, (helpers.adapter("planned"),)))
    desk.loaded("planned")
    desk.arrive("runs", [1], helpers.adapter("busy"), max_tokens=9)
    desk.loaded("busy")
    ran(desk, helpers, "old")
    assert expect(desk, helpers, "a") == []
    desk.now += SPARES_S[PrefetchKind.ADMISSION]
    (evict, _) = expect(desk, helpers, "b")
    assert (evict.version, evict.slot) == ("old", 0)


def test_a_prefetch_takes_no_room_that_a_request_waits_for(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(pool_bytes=2 * helpers.UNIT)
    desk.arrive("runs", [1], helpers.adapter("busy"), max_tokens=9)
    desk.loaded("busy")
    desk.arrive("waits", [1], helpers.adapter("double", units=2))
    assert expect(desk, helpers, "a") == []
    desk.tell(RequestAborted("waits"))
    assert desk.loads == ["a"]


def test_waiting_requests_load_before_expected_adapters_and_those_before_the_plan(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(pool_bytes=8 * helpers.UNIT, max_loads=1)
    desk.arrive("first", [1], helpers.adapter("first"))
    desk.tell(CopiesRequested(1, (helpers.adapter("planned"),)))
    expect(desk, helpers, "expected")
    desk.arrive("second", [1], helpers.adapter("second"))
    order = []
    while desk.loads:
        (loading,) = desk.loads
        order.append(loading)
        desk.now -= 0.9
        desk.loaded(loading)
    assert order == ["first", "second", "expected", "planned"]


def test_a_failed_prefetch_is_not_repeated(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    expect(desk, helpers, "a")
    desk.tell(AdapterLoadFailed("a", "not_found", "gone"))
    assert desk.loads == []
    assert expect(desk, helpers, "huge", units=9) == []
    assert desk.loads == []


def test_further_candidates_are_ignored_when_there_are_too_many(helpers: SimpleNamespace) -> None:
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
    """Teach the engine that b follows a, then evict both with c and d."""
    for _ in range(LEAST_TIMES):
        desk.now += 10 * WINDOW_S
        ran(desk, helpers, "a")
        desk.now -= 1.0
        ran(desk, helpers, "b")
    desk.now += 10 * WINDOW_S
    ran(desk, helpers, "c", "d")


def test_a_usual_follower_is_loaded_before_its_request_comes(helpers: SimpleNamespace) -> None:
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


def test_a_usual_follower_evicts_nothing_that_was_used_lately(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    learn(desk, helpers)
    ran(desk, helpers, "a", "c")
    assert desk.loads == []


def test_loads_of_a_plan_are_counted_as_useful_or_wasted(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.tell(CopiesRequested(1, (helpers.adapter("a"), helpers.adapter("b"))))
    desk.loaded("a")
    assert PlanReady(1, {}) in desk.loaded("b")
    ran(desk, helpers, "a")
    assert counts(desk) == {"plan": (2, 1, 0)}
    ran(desk, helpers, "c", "d")
    assert counts(desk) == {"plan": (2, 1, 1)}, "they left for what requests wanted"
    ran(desk, helpers, "a", "b")
    assert counts(desk) == {"plan": (2, 1, 1)}, "this time requests had waited for them"
