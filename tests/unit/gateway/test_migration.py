"""What follows when an attempt of a request fails: migration, a trial, quarantine, or giving up."""

from typing import Any

import msgspec
import pytest

from loraserve.gateway.errors import ApiError, refused
from loraserve.gateway.migration import (
    MAX_QUARANTINED,
    QUARANTINE_S,
    Attempts,
    Cause,
    Interruption,
    Quarantine,
    Verdict,
    fingerprint,
)
from loraserve.messages import AdapterRef, Route, SamplingParams


def interruption(cause: Cause = Cause.DIED, engine: str = "engine-0") -> Interruption:
    return Interruption(cause, engine, refused("engine_died", "why"))


def route(*prompt: int, **sampling: Any) -> Route:
    params = SamplingParams(**{"max_tokens": 8, **sampling})
    return Route(request_id="r", gateway="g", prompt_tokens=prompt or (1, 2), sampling=params)


def test_attempts_are_bounded() -> None:
    attempts = Attempts(max_attempts=3)
    verdicts = []
    for tokens in (1, 2, 3):
        assert not attempts.note(interruption(), tokens)
        verdicts.append(attempts.decide(0))
    assert verdicts == [Verdict.MIGRATE, Verdict.MIGRATE, Verdict.GIVE_UP]
    assert attempts.number == 2


def test_a_request_outlives_any_number_of_planned_restarts() -> None:
    attempts = Attempts(max_attempts=2)
    for tokens in (1, 2, 3, 4):
        attempts.note(interruption(Cause.REFUSED), tokens)
        assert attempts.decide(0) is Verdict.MIGRATE
    assert (attempts.number, attempts.failed) == (4, 0)
    verdicts = []
    for _ in range(2):
        attempts.note(interruption(Cause.REFUSED), 4)
        verdicts.append(attempts.decide(0))
    assert verdicts == [Verdict.MIGRATE, Verdict.GIVE_UP], "without progress they count"


def test_engines_that_failed_the_request_are_avoided_and_lossy_connections_are_not() -> None:
    attempts = Attempts(max_attempts=9)
    for cause, engine in ((Cause.REFUSED, "e0"), (Cause.LOST, "e1"), (Cause.SILENT, "e2"), (Cause.REFUSED, "e0")):
        attempts.note(interruption(cause, engine), 0)
    assert attempts.avoid == ("e0", "e2")


@pytest.mark.parametrize(
    ("events", "is_suspect"),
    [
        ([(Cause.DIED, 0)], False),
        ([(Cause.DIED, 0), (Cause.DIED, 0)], True),
        ([(Cause.DIED, 7), (Cause.DIED, 7)], True),
        ([(Cause.DIED, 0), (Cause.DIED, 1)], False),
        ([(Cause.DIED, 0), (Cause.SILENT, 0)], False),
        ([(Cause.SILENT, 0), (Cause.DIED, 0)], False),
        ([(Cause.DIED, 0), (Cause.REFUSED, 0), (Cause.DIED, 0)], True),
        ([(Cause.DIED, 0), (Cause.DIED, 1), (Cause.DIED, 1)], True),
    ],
)
def test_a_suspect_got_no_token_between_two_deaths(events: list[tuple[Cause, int]], is_suspect: bool) -> None:
    attempts = Attempts(max_attempts=9)
    *_, last = [attempts.note(interruption(cause), tokens) for cause, tokens in events]
    assert last == is_suspect
    assert attempts.decide(1) is (Verdict.QUARANTINE if is_suspect else Verdict.MIGRATE)


def test_several_suspects_are_tried_alone_and_the_next_death_convicts() -> None:
    attempts = Attempts(max_attempts=9)
    attempts.note(interruption(), 4)
    attempts.decide(0)
    assert attempts.note(interruption(), 4)
    assert attempts.decide(suspects=3) is Verdict.TRY_ALONE
    attempts.on_trial = True
    assert attempts.note(interruption(), 4)
    assert attempts.decide(suspects=1) is Verdict.QUARANTINE


def test_a_request_that_fails_the_steps_of_three_engines_is_given_up() -> None:
    attempts = Attempts(max_attempts=9)
    verdicts = []
    for _ in range(3):
        attempts.note(interruption(Cause.STEP_FAILED), 4)
        verdicts.append(attempts.decide(0))
        attempts.on_trial = verdicts[-1] is Verdict.TRY_ALONE
    assert verdicts == [Verdict.MIGRATE, Verdict.TRY_ALONE, Verdict.GIVE_UP]


def test_equal_requests_are_refused_for_a_time() -> None:
    quarantine = Quarantine()
    quarantine.add(route(1, 2, 3, seed=5), 100.0)
    for same in (route(1, 2, 3, seed=6), msgspec.structs.replace(route(1, 2, 3, 9, 9), generated=2)):
        with pytest.raises(ApiError) as caught:
            quarantine.check(same, 100.0 + QUARANTINE_S - 1)
        assert (caught.value.status, caught.value.code) == (422, "request_quarantined")
    for other in (route(1, 2), route(1, 2, 3, temperature=0.5)):
        quarantine.check(other, 101.0)
    quarantine.check(route(1, 2, 3), 100.0 + QUARANTINE_S)
    assert len(quarantine) == 0


def test_the_quarantine_is_bounded() -> None:
    quarantine = Quarantine()
    for number in range(MAX_QUARANTINED + 10):
        quarantine.add(route(number), 0.0)
    assert len(quarantine) == MAX_QUARANTINED


def test_requests_of_different_adapters_differ() -> None:
    adapter = AdapterRef(name="a", version="v", rank=8, slab_bytes=1)
    assert fingerprint(route()) != fingerprint(msgspec.structs.replace(route(), adapter=adapter))
