"""Loads that nobody wants any more: cancelled once, without harm to whoever wants the same adapter in the meantime."""

from types import SimpleNamespace

from loraserve.engine.schedule.events import (
    CANCELLED,
    AdapterLoadFailed,
    CancelLoad,
    CopiesRetired,
    EvictAdapter,
    Instruction,
    LoadAdapter,
    PlanPrepared,
    PlanReady,
    RequestAborted,
)


def ended(desk: SimpleNamespace, version: str) -> list[Instruction]:
    """The engine says that a cancelled load is over."""
    instructions: list[Instruction] = desk.tell(AdapterLoadFailed(version, CANCELLED, "nobody wants it any more"))
    return instructions


def test_a_load_is_cancelled_once_when_the_last_who_waits_for_it_has_left(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    for name in ("first", "second"):
        desk.arrive(name, [1], helpers.adapter("a"))
    assert desk.tell(RequestAborted("first")) == []
    assert desk.tell(RequestAborted("second")) == [CancelLoad("a")]
    assert desk.tell(RequestAborted("second")) == []
    assert desk.scheduler.load().pool_free_bytes == helpers.UNIT, "something may still write to it"
    assert ended(desk, "a") == [EvictAdapter("a", 0, "name-a", "its load failed or was cancelled")]
    assert desk.scheduler.load().pool_free_bytes == 2 * helpers.UNIT
    assert any("nobody wants it any more" in line for line in desk.scheduler.story("a"))


def test_who_comes_while_a_load_is_being_cancelled_gets_another(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("gone", [1], helpers.adapter("a"))
    desk.tell(RequestAborted("gone"))
    desk.arrive("next", [1], helpers.adapter("a"))
    assert desk.loads == ["a"], "two loads of one adapter are never under way"
    evict, load = ended(desk, "a")
    assert evict == EvictAdapter("a", 0, "name-a", "its load failed or was cancelled")
    assert isinstance(load, LoadAdapter)
    assert desk.rejected == {}
    desk.loaded("a")
    assert desk.sizes == {"next": 1}


def test_a_load_that_ended_before_it_heard_serves_who_came(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("gone", [1], helpers.adapter("a"))
    desk.tell(RequestAborted("gone"))
    desk.arrive("next", [1], helpers.adapter("a"))
    desk.loaded("a")
    assert desk.sizes == {"next": 1}


def test_a_load_that_failed_before_it_heard_is_a_failure_to_who_came(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("gone", [1], helpers.adapter("a"))
    desk.tell(RequestAborted("gone"))
    desk.arrive("next", [1], helpers.adapter("a"))
    desk.tell(AdapterLoadFailed("a", "corrupt", "the digest is wrong"))
    assert desk.rejected.keys() == {"next"}


def test_a_load_that_the_plan_wants_goes_on(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("gone", [1], helpers.adapter("a"))
    desk.tell(PlanPrepared(1, (helpers.adapter("a"),)))
    assert desk.tell(RequestAborted("gone")) == []
    assert desk.loaded("a") == [PlanReady(1, {})]


def test_a_plan_that_comes_while_a_load_is_being_cancelled_gets_another(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("gone", [1], helpers.adapter("a"))
    desk.tell(RequestAborted("gone"))
    assert desk.tell(PlanPrepared(1, (helpers.adapter("a"),))) == []
    ended(desk, "a")
    assert desk.loads == ["a"]
    assert desk.loaded("a") == [PlanReady(1, {})]


def test_what_a_plan_gave_up_is_cancelled_unless_a_request_waits_for_it(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.tell(PlanPrepared(1, (helpers.adapter("a"), helpers.adapter("b"))))
    desk.arrive("waits", [1], helpers.adapter("a"))
    given_up, cancel = desk.tell(CopiesRetired(1, ()))
    assert isinstance(given_up, PlanReady)
    assert given_up.failed.keys() == {"a", "b"}
    assert cancel == CancelLoad("b")


def test_who_waits_for_room_gets_that_of_a_cancelled_load(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(pool_bytes=helpers.UNIT)
    desk.arrive("gone", [1], helpers.adapter("a"))
    desk.arrive("waits", [1], helpers.adapter("b"))
    assert desk.tell(RequestAborted("gone")) == [CancelLoad("a")]
    ended(desk, "a")
    assert desk.loads == ["b"]
