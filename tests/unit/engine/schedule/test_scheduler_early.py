"""Early starts: a step that started before its adapter had been read counts only if the read was verified in time."""

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
    """Return a desk with one request that started early and whose step is in flight."""
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
    """Report the step as done, with a layer that was late."""
    step = desk.steps.popleft()
    drawn = tuple(Sampled(request_id=s.request_id, token=7) for s in step.sequences)
    desk.tell(StepDone(StepResult(step_id=step.step_id, sampled=drawn, duration_s=0.01, late=("early",))))


def test_a_step_counts_if_its_read_was_verified_meanwhile(desk: Any) -> None:
    loaded(desk, "a", 1)
    desk.step_done(7)
    assert desk.output == {"early": [7]}
    assert desk.sizes == {"early": 1}, "it continues with its next token"
    assert desk.scheduler.early.discarded == 0


@pytest.mark.parametrize("read", [0, 2])
def test_a_step_does_not_count_if_another_read_was_verified(desk: Any, read: int) -> None:
    loaded(desk, "a", read)
    desk.step_done(7)
    assert desk.output == {"early": []}
    assert desk.sizes == {"early": len(PROMPT)}, "it starts again with the loaded adapter"
    desk.step_done(8)
    assert desk.output == {"early": [8]}
    assert (desk.scheduler.early.started, desk.scheduler.early.discarded) == (1, 1)


def test_a_step_does_not_count_before_the_read_is_verified_and_is_not_repeated_with_it(desk: Any) -> None:
    desk.step_done(7)
    assert desk.output == {"early": []}
    assert desk.step is None
    desk.tell(AdapterArriving("a", 1, 1))
    assert desk.step is None, "the same read must not be tried again"
    loaded(desk, "a", 1)
    desk.step_done(8)
    assert desk.output == {"early": [8]}


def test_a_step_with_a_late_layer_does_not_count(desk: Any) -> None:
    loaded(desk, "a", 1)
    late(desk)
    assert desk.output == {"early": []}
    desk.step_done(8)
    assert desk.output == {"early": [8]}


def test_a_new_read_allows_another_early_start(desk: Any) -> None:
    desk.step_done(7)
    desk.tell(AdapterArriving("a", 2, 1))
    assert desk.sizes == {"early": len(PROMPT)}
    loaded(desk, "a", 2)
    desk.step_done(8)
    assert desk.output == {"early": [8]}


def test_a_step_that_would_end_too_soon_does_not_start_early(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("short", [1, 2], helpers.adapter("a"))
    desk.tell(AdapterArriving("a", 1, 3))
    assert desk.step is None
    desk.tell(AdapterArriving("a", 1, None))
    assert desk.step is None
    desk.tell(AdapterArriving("a", 1, 2))
    assert desk.sizes == {"short": 2}


def test_cached_tokens_do_not_count_for_an_early_start(helpers: SimpleNamespace) -> None:
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


def test_blocks_of_an_early_start_are_not_cached_before_it_counts(desk: Any, helpers: SimpleNamespace) -> None:
    desk.step_done(7)
    loaded(desk, "a", 1)
    assert desk.part("early").start == 0


def test_other_requests_in_the_step_keep_their_results(helpers: SimpleNamespace) -> None:
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


def test_a_failed_load_rejects_early_starts_and_keeps_the_extent_until_the_step_is_done(desk: Any) -> None:
    desk.loads.remove("a")
    instructions = desk.tell(AdapterLoadFailed("a", "not_found", "gone"))
    assert desk.rejected["early"].code == "adapter_unavailable"
    assert not any(isinstance(instruction, EvictAdapter) for instruction in instructions), (
        "the step in flight reads the extent"
    )
    assert desk.scheduler.load().memory.pool_free_bytes < desk.scheduler.limits.pool_bytes
    assert desk.step_done() == [EvictAdapter("a", 0, "name-a", "its load failed or was cancelled")]
    assert desk.scheduler.load().memory.pool_free_bytes == desk.scheduler.limits.pool_bytes
    assert desk.scheduler.is_idle


def test_a_request_after_a_failed_load_gets_another_load(desk: Any, helpers: SimpleNamespace) -> None:
    desk.loads.remove("a")
    desk.tell(AdapterLoadFailed("a", "not_found", "gone"))
    desk.arrive("next", [1], helpers.adapter("a"))
    assert desk.loads == [], "the slot is still in use"
    evict, load = desk.step_done()
    assert evict == EvictAdapter("a", 0, "name-a", "its load failed or was cancelled")
    assert isinstance(load, LoadAdapter)
    loaded(desk, "a", 2)
    assert desk.sizes == {"next": 1}


def test_a_failed_load_no_longer_counts_as_loading(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(max_loads=1)
    desk.arrive("early", PROMPT, helpers.adapter("a"))
    desk.tell(AdapterArriving("a", 1, 1))
    desk.arrive("other", [1], helpers.adapter("b"))
    assert desk.loads == ["a"]
    desk.loads.remove("a")
    desk.tell(AdapterLoadFailed("a", "not_found", "gone"))
    assert desk.loads == ["b"], "although a step in flight reads the extent"


def test_a_load_is_not_cancelled_while_an_early_start_is_in_a_step(desk: Any) -> None:
    assert desk.tell(RequestAborted("early")) == []
    assert desk.step_done() == [CancelLoad("a")], "no request needs it now"
    assert desk.tell(AdapterLoadFailed("a", CANCELLED, "nobody wants it any more")) == [
        EvictAdapter("a", 0, "name-a", "its load failed or was cancelled")
    ]
    assert desk.scheduler.is_idle


def test_no_request_starts_early_with_a_cancelled_load(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("gone", [1], helpers.adapter("a"))
    assert desk.tell(RequestAborted("gone")) == [CancelLoad("a")]
    desk.arrive("next", PROMPT, helpers.adapter("a"))
    desk.tell(AdapterArriving("a", 1, 1))
    assert desk.step is None


def test_a_failed_step_rejects_the_early_start_and_the_load_continues(desk: Any, helpers: SimpleNamespace) -> None:
    desk.arrive("next", PROMPT, helpers.adapter("a"))
    desk.tell(StepFailed(desk.steps.popleft().step_id, "boom"))
    assert desk.rejected.keys() == {"early"}
    assert desk.sizes == {"next": len(PROMPT)}
    loaded(desk, "a", 1)
    desk.step_done(7)
    assert desk.output["next"] == [7]
