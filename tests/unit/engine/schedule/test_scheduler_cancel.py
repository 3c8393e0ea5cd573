"""Loads that no request needs any more are cancelled once; later requests for the adapter get another load."""

from types import SimpleNamespace

from loraserve.engine.schedule.events import (
    CANCELLED,
    AdapterLoadFailed,
    CancelLoad,
    CopiesRequested,
    CopiesRetired,
    EvictAdapter,
    Instruction,
    LoadAdapter,
    PlanReady,
    RequestAborted,
)


def report_cancelled(desk: SimpleNamespace, version: str) -> list[Instruction]:
    """Report that a cancelled load has ended."""
    instructions: list[Instruction] = desk.tell(AdapterLoadFailed(version, CANCELLED, "nobody wants it any more"))
    return instructions


def test_a_load_is_cancelled_once_its_last_request_has_left(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    for name in ("first", "second"):
        desk.arrive(name, [1], helpers.adapter("a"))
    assert desk.tell(RequestAborted("first")) == []
    assert desk.tell(RequestAborted("second")) == [CancelLoad("a")]
    assert desk.tell(RequestAborted("second")) == []
    assert desk.scheduler.load().memory.pool_free_bytes == helpers.UNIT, "the load may still write to its extent"
    assert report_cancelled(desk, "a") == [EvictAdapter("a", 0, "name-a", "its load failed or was cancelled")]
    assert desk.scheduler.load().memory.pool_free_bytes == 2 * helpers.UNIT
    assert any("nobody wants it any more" in line for line in desk.scheduler.story.lines("a"))


def test_a_request_during_a_cancellation_gets_another_load(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("gone", [1], helpers.adapter("a"))
    desk.tell(RequestAborted("gone"))
    desk.arrive("next", [1], helpers.adapter("a"))
    assert desk.loads == ["a"], "an adapter must not be loaded twice at a time"
    evict, load = report_cancelled(desk, "a")
    assert evict == EvictAdapter("a", 0, "name-a", "its load failed or was cancelled")
    assert isinstance(load, LoadAdapter)
    assert desk.rejected == {}
    desk.loaded("a")
    assert desk.sizes == {"next": 1}


def test_a_load_that_completed_before_the_cancellation_serves_new_requests(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("gone", [1], helpers.adapter("a"))
    desk.tell(RequestAborted("gone"))
    desk.arrive("next", [1], helpers.adapter("a"))
    desk.loaded("a")
    assert desk.sizes == {"next": 1}


def test_a_load_that_failed_before_the_cancellation_rejects_new_requests(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("gone", [1], helpers.adapter("a"))
    desk.tell(RequestAborted("gone"))
    desk.arrive("next", [1], helpers.adapter("a"))
    desk.tell(AdapterLoadFailed("a", "corrupt", "the digest is wrong"))
    assert desk.rejected.keys() == {"next"}


def test_a_planned_load_is_not_cancelled(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("gone", [1], helpers.adapter("a"))
    desk.tell(CopiesRequested(1, (helpers.adapter("a"),)))
    assert desk.tell(RequestAborted("gone")) == []
    assert desk.loaded("a") == [PlanReady(1, {})]


def test_a_plan_during_a_cancellation_gets_another_load(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("gone", [1], helpers.adapter("a"))
    desk.tell(RequestAborted("gone"))
    assert desk.tell(CopiesRequested(1, (helpers.adapter("a"),))) == []
    report_cancelled(desk, "a")
    assert desk.loads == ["a"]
    assert desk.loaded("a") == [PlanReady(1, {})]


def test_loads_of_a_superseded_plan_are_cancelled_unless_requested(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.tell(CopiesRequested(1, (helpers.adapter("a"), helpers.adapter("b"))))
    desk.arrive("waits", [1], helpers.adapter("a"))
    given_up, cancel = desk.tell(CopiesRetired(1, ()))
    assert isinstance(given_up, PlanReady)
    assert given_up.failed.keys() == {"a", "b"}
    assert cancel == CancelLoad("b")


def test_the_room_of_a_cancelled_load_goes_to_a_waiting_request(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(pool_bytes=helpers.UNIT)
    desk.arrive("gone", [1], helpers.adapter("a"))
    desk.arrive("waits", [1], helpers.adapter("b"))
    assert desk.tell(RequestAborted("gone")) == [CancelLoad("a")]
    report_cancelled(desk, "a")
    assert desk.loads == ["b"]
