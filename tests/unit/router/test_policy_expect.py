"""Where an adapter is brought to before its request is there, and what that request then finds."""

from random import Random

import pytest

from loraserve.cost import CostModel
from loraserve.messages import EngineLoad, Expect, Rejected
from loraserve.router.context import RoutingContext, Slo
from loraserve.router.policy import placeholder_request, prefetch_engine, route_by_prediction
from loraserve.router.view import PENDING_TIMEOUT_S, ClusterView
from loraserve.testing.reports import MIB, adapter_ref, engine_load, picture, resident, route_request

SLO = Slo(ttft_s=10.0, reject_factor=4.0)
NOW = 100.0
PIRATE = adapter_ref(1, slab_bytes=32 * MIB)
EXPECT = Expect(adapter=PIRATE, prompt_tokens=50)


def view_of(*loads: EngineLoad) -> ClusterView:
    view = ClusterView()
    view.update(picture(*loads), now=NOW)
    return view


def told(view: ClusterView, expect: Expect = EXPECT, slo: Slo = SLO) -> str | None:
    """Who has to hear; it is noted as the router does."""
    engine = prefetch_engine(RoutingContext(placeholder_request(expect), view, None, CostModel(), slo, Random(0)))
    if engine is not None:
        view.record_expected(engine, expect.adapter.version, NOW)
    view.validate()
    return engine


def goes_to(view: ClusterView, seed: int = 0) -> tuple[str, str]:
    choice = route_by_prediction(
        RoutingContext(route_request("r", 50, PIRATE), view, None, CostModel(), SLO, Random(seed))
    )
    assert not isinstance(choice, Rejected)
    return choice.first.engine, choice.first.why


def equal_engines(count: int = 4) -> ClusterView:
    return view_of(*(engine_load(f"e{n}") for n in range(count)))


def test_it_is_brought_where_the_request_would_go_and_that_goes_there_for_it() -> None:
    view = equal_engines()
    engine = told(view)
    assert engine is not None
    assert {goes_to(view, seed) for seed in range(20)} == {(engine, "resident")}
    assert told(view) is None, "it is on its way already"


@pytest.mark.parametrize("where", ["resident", "loading"])
def test_nobody_hears_of_what_is_there_or_on_its_way(where: str) -> None:
    held = {"resident": (resident(PIRATE),)} if where == "resident" else {"loading": (PIRATE.version,)}
    view = view_of(engine_load("e0"), engine_load("e1", **held))
    assert told(view) is None
    view = view_of(engine_load("e0"), engine_load("e1"))
    view.record_sent("e1", route_request("other", 10, PIRATE), NOW)
    assert told(view) is None, "another request takes it there"


def test_it_is_brought_beside_a_copy_that_is_too_busy() -> None:
    busy = engine_load("e1", resident=(resident(PIRATE, running=9),), waiting_prefill_tokens=9000)
    assert told(view_of(engine_load("e0"), busy)) == "e0"


def test_nobody_hears_of_what_would_be_refused() -> None:
    assert told(ClusterView()) is None
    full = engine_load("e0", waiting_prefill_tokens=10_000_000)
    assert told(view_of(full)) is None
    assert told(view_of(engine_load("e0", max_model_tokens=40))) is None, "its prompt is too long"


@pytest.mark.parametrize(("tokens", "engine"), [(10, None), (500, "e0")], ids=["short", "long"])
def test_a_prompt_is_priced_by_its_length(tokens: int, engine: str | None) -> None:
    """A slow engine has the adapter: for a long prompt another starts sooner all the same."""
    slow = engine_load("e1", resident=(resident(PIRATE),), running=4, decode_step_s=0.2, prefill_tokens_per_s=200.0)
    assert told(view_of(engine_load("e0"), slow), Expect(adapter=PIRATE, prompt_tokens=tokens)) == engine


def test_what_was_not_begun_is_believed_for_a_moment_only() -> None:
    view = equal_engines()
    assert told(view) is not None
    view.expire_pending(NOW + PENDING_TIMEOUT_S / 2)
    assert told(view) is None
    view.expire_pending(NOW + 2 * PENDING_TIMEOUT_S)
    view.validate()
    assert told(view) is not None


def test_a_later_report_that_does_not_know_of_it_ends_the_belief() -> None:
    view = equal_engines()
    assert told(view) is not None
    view.update(picture(*(engine_load(f"e{n}") for n in range(4)), sequence=2), NOW + 0.3)
    view.validate()
    assert told(view) is not None


def test_a_restarted_engine_has_forgotten_what_it_was_told() -> None:
    view = equal_engines(1)
    assert told(view) == "e0"
    view.record_sent("e0", route_request("r"), NOW)
    view.record_admitted("e0", "r", "another life", NOW)
    assert told(view) == "e0"
    view.update(picture(engine_load("e0", incarnation="a third"), sequence=2, age_s=1.0), NOW)
    view.validate()
    assert told(view) == "e0"
