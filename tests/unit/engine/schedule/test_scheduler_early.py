"""Requests that begin before the last of their adapter is there: what comes of it counts only if that came in time."""

from types import SimpleNamespace
from typing import Any

import pytest

from loraserve.engine.schedule.events import (
    CANCELLED,
    AdapterArriving,
    AdapterLoaded,
    AdapterLoadFailed,
    CancelLoad,
    EvictAdapter,
    LoadAdapter,
    RequestAborted,
    Sampled,
    StepDone,
    StepFailed,
    StepResult,
)

PROMPT = [1, 2, 3, 4, 5]


@pytest.fixture
def desk(helpers: SimpleNamespace) -> Any:
    """Whose first request's adapter is on its way, and whose step with it is out."""
    desk = helpers.Desk()
    desk.arrive("early", PROMPT, helpers.adapter("a"))
    assert desk.step is None
    desk.tell(AdapterArriving("a", 1, len(PROMPT)))
    assert desk.sizes == {"early": len(PROMPT)}
    return desk


def loaded(desk: Any, version: str, read: int) -> None:
    desk.loads.remove(version)
    desk.tell(AdapterLoaded(version, read))


def late(desk: Any) -> None:
    """The step ends, and did not find all layers."""
    step = desk.steps.popleft()
    drawn = tuple(Sampled(request_id=s.request_id, token=7) for s in step.sequences)
    desk.tell(StepDone(StepResult(step_id=step.step_id, sampled=drawn, duration_s=0.01, late=("early",))))


def test_what_a_step_brings_counts_where_the_read_that_it_began_with_was_verified_meanwhile(desk: Any) -> None:
    loaded(desk, "a", 1)
    desk.step_done(7)
    assert desk.output == {"early": [7]}
    assert desk.sizes == {"early": 1}, "it goes on with its next token"
    assert desk.scheduler.early.discarded == 0


@pytest.mark.parametrize("read", [0, 2])
def test_it_does_not_count_where_the_slab_came_by_another_read(desk: Any, read: int) -> None:
    loaded(desk, "a", read)
    desk.step_done(7)
    assert desk.output == {"early": []}
    assert desk.sizes == {"early": len(PROMPT)}, "it begins anew, with what is there now"
    desk.step_done(8)
    assert desk.output == {"early": [8]}
    assert (desk.scheduler.early.started, desk.scheduler.early.discarded) == (1, 1)


def test_it_does_not_count_before_the_slab_is_verified_and_is_not_tried_again_with_that_read(desk: Any) -> None:
    desk.step_done(7)
    assert desk.output == {"early": []}
    assert desk.step is None
    desk.tell(AdapterArriving("a", 1, 1))
    assert desk.step is None, "it would be in vain again"
    loaded(desk, "a", 1)
    desk.step_done(8)
    assert desk.output == {"early": [8]}


def test_it_does_not_count_where_a_layer_was_late_although_all_came_in_the_end(desk: Any) -> None:
    loaded(desk, "a", 1)
    late(desk)
    assert desk.output == {"early": []}
    desk.step_done(8)
    assert desk.output == {"early": [8]}


def test_another_read_is_another_chance(desk: Any) -> None:
    desk.step_done(7)
    desk.tell(AdapterArriving("a", 2, 1))
    assert desk.sizes == {"early": len(PROMPT)}
    loaded(desk, "a", 2)
    desk.step_done(8)
    assert desk.output == {"early": [8]}


def test_a_step_that_would_be_over_too_soon_is_not_begun(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("short", [1, 2], helpers.adapter("a"))
    desk.tell(AdapterArriving("a", 1, 3))
    assert desk.step is None
    desk.tell(AdapterArriving("a", 1, None))
    assert desk.step is None
    desk.tell(AdapterArriving("a", 1, 2))
    assert desk.sizes == {"short": 2}


def test_only_tokens_that_are_to_be_computed_make_a_step_last(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(pool_bytes=helpers.UNIT)
    prompt = list(range(1, 11))
    desk.arrive("before", prompt, helpers.adapter("a"), max_tokens=1)
    desk.loaded("a")
    desk.step_done()
    desk.arrive("other", [1], helpers.adapter("b"), max_tokens=1)
    desk.loaded("b")
    desk.step_done()
    desk.arrive("again", prompt, helpers.adapter("a"))
    desk.tell(AdapterArriving("a", 1, 3))
    assert desk.step is None, "eight of its ten tokens are cached"
    desk.tell(AdapterArriving("a", 1, 2))
    assert desk.sizes == {"again": 2}
    loaded(desk, "a", 1)
    desk.step_done()
    assert desk.cached["again"] == 8


def test_nothing_of_it_is_shared_before_it_counts(desk: Any, helpers: SimpleNamespace) -> None:
    desk.step_done(7)
    loaded(desk, "a", 1)
    assert desk.part("early").start == 0


def test_others_run_in_the_same_step_and_keep_what_it_brings_them(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("base", [1])
    desk.arrive("early", PROMPT, helpers.adapter("a"))
    desk.step_done(7)
    desk.tell(AdapterArriving("a", 1, 1))
    desk.step_done(7)
    assert desk.sizes == {"base": 1, "early": len(PROMPT)}
    late(desk)
    assert desk.output == {"base": [7, 7, 7], "early": []}
    assert desk.sizes == {"base": 1}


def test_a_load_that_fails_ends_who_began_with_it_and_leaves_the_extent_until_the_step_is_over(desk: Any) -> None:
    desk.loads.remove("a")
    told = desk.tell(AdapterLoadFailed("a", "not_found", "gone"))
    assert desk.rejected["early"].code == "adapter_unavailable"
    assert not any(isinstance(each, EvictAdapter) for each in told), "the step computes with what lies there"
    assert desk.scheduler.load().pool_free_bytes < desk.scheduler.limits.pool_bytes
    assert desk.step_done() == [EvictAdapter("a", 0, "name-a", "its load failed or was cancelled")]
    assert desk.scheduler.load().pool_free_bytes == desk.scheduler.limits.pool_bytes
    assert desk.scheduler.is_idle


def test_who_comes_after_such_a_failure_gets_another_load(desk: Any, helpers: SimpleNamespace) -> None:
    desk.loads.remove("a")
    desk.tell(AdapterLoadFailed("a", "not_found", "gone"))
    desk.arrive("next", [1], helpers.adapter("a"))
    assert desk.loads == [], "the slot is in use still"
    evict, load = desk.step_done()
    assert evict == EvictAdapter("a", 0, "name-a", "its load failed or was cancelled")
    assert isinstance(load, LoadAdapter)
    loaded(desk, "a", 2)
    assert desk.sizes == {"next": 1}


def test_the_place_of_such_a_load_is_free_at_once(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(max_loads=1)
    desk.arrive("early", PROMPT, helpers.adapter("a"))
    desk.tell(AdapterArriving("a", 1, 1))
    desk.arrive("other", [1], helpers.adapter("b"))
    assert desk.loads == ["a"]
    desk.loads.remove("a")
    desk.tell(AdapterLoadFailed("a", "not_found", "gone"))
    assert desk.loads == ["b"], "though a step computes with what lies there"


def test_a_load_is_not_cancelled_under_who_began_with_it(desk: Any) -> None:
    assert desk.tell(RequestAborted("early")) == []
    assert desk.step_done() == [CancelLoad("a")], "now nobody wants it"
    assert desk.tell(AdapterLoadFailed("a", CANCELLED, "nobody wants it any more")) == [
        EvictAdapter("a", 0, "name-a", "its load failed or was cancelled")
    ]
    assert desk.scheduler.is_idle


def test_with_a_load_that_is_being_cancelled_nobody_begins(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("gone", [1], helpers.adapter("a"))
    assert desk.tell(RequestAborted("gone")) == [CancelLoad("a")]
    desk.arrive("next", PROMPT, helpers.adapter("a"))
    desk.tell(AdapterArriving("a", 1, 1))
    assert desk.step is None


def test_a_step_that_fails_ends_it_and_the_load_goes_on_for_others(desk: Any, helpers: SimpleNamespace) -> None:
    desk.arrive("next", PROMPT, helpers.adapter("a"))
    desk.tell(StepFailed(desk.steps.popleft().step_id, "boom"))
    assert desk.rejected.keys() == {"early"}
    assert desk.sizes == {"next": len(PROMPT)}
    loaded(desk, "a", 1)
    desk.step_done(7)
    assert desk.output["next"] == [7]
