"""Prefetching the adapter of an announced request, and where that request then goes."""

from random import Random

import pytest

from loraserve.cost import CostModel
from loraserve.messages import EngineSeen, Expect, Rejected
from loraserve.router.context import RoutingContext, Slo
from loraserve.router.policy import placeholder_request, prefetch_engine, route_by_prediction
from loraserve.router.view import PENDING_TIMEOUT_S, ClusterView
from loraserve.testing.reports import MIB, adapter_ref, engine_seen, picture, resident, route_request

SLO = Slo(ttft_s=10.0, reject_factor=4.0)
NOW = 100.0
PIRATE = adapter_ref(1, slab_bytes=32 * MIB)
EXPECT = Expect(adapter=PIRATE, prompt_tokens=50)


def view_of(*loads: EngineSeen) -> ClusterView:
    view = ClusterView()
    view.update(picture(*loads), now=NOW)
    return view


def prefetch(view: ClusterView, expect: Expect = EXPECT, slo: Slo = SLO) -> str | None:
    """Return the engine that is told to prefetch, and record the choice as the router does."""
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
    return view_of(*(engine_seen(f"e{n}") for n in range(count)))


def test_the_adapter_is_prefetched_on_the_engine_that_the_request_then_goes_to() -> None:
    view = equal_engines()
    engine = prefetch(view)
    assert engine is not None
    assert {goes_to(view, seed) for seed in range(20)} == {(engine, "resident")}
    assert prefetch(view) is None, "it is on its way already"


@pytest.mark.parametrize("where", ["resident", "loading"])
def test_a_resident_or_loading_adapter_is_not_prefetched(where: str) -> None:
    held = {"resident": (resident(PIRATE),)} if where == "resident" else {"loading": (PIRATE.version,)}
    view = view_of(engine_seen("e0"), engine_seen("e1", **held))
    assert prefetch(view) is None
    view = view_of(engine_seen("e0"), engine_seen("e1"))
    view.record_sent("e1", route_request("other", 10, PIRATE), NOW)
    assert prefetch(view) is None, "another request takes it there"


def test_an_adapter_is_prefetched_elsewhere_if_its_copy_is_too_busy() -> None:
    busy = engine_seen("e1", resident=(resident(PIRATE, running=9),), waiting_prefill_tokens=9000)
    assert prefetch(view_of(engine_seen("e0"), busy)) == "e0"


def test_the_adapter_of_a_request_that_would_be_rejected_is_not_prefetched() -> None:
    assert prefetch(ClusterView()) is None
    full = engine_seen("e0", waiting_prefill_tokens=10_000_000)
    assert prefetch(view_of(full)) is None
    assert prefetch(view_of(engine_seen("e0", max_model_tokens=40))) is None, "its prompt is too long"


@pytest.mark.parametrize(("tokens", "engine"), [(10, None), (500, "e0")], ids=["short", "long"])
def test_the_announced_prompt_length_decides_where_to_prefetch(tokens: int, engine: str | None) -> None:
    """A slow engine holds the adapter; another engine starts a long prompt sooner even so."""
    slow = engine_seen("e1", resident=(resident(PIRATE),), running=4, decode_step_s=0.2, prefill_tokens_per_s=200.0)
    assert prefetch(view_of(engine_seen("e0"), slow), Expect(adapter=PIRATE, prompt_tokens=tokens)) == engine


def test_an_expected_load_that_is_never_reported_expires() -> None:
    view = equal_engines()
    assert prefetch(view) is not None
    view.expire_pending(NOW + PENDING_TIMEOUT_S / 2)
    assert prefetch(view) is None
    view.expire_pending(NOW + 2 * PENDING_TIMEOUT_S)
    view.validate()
    assert prefetch(view) is not None


def test_a_later_report_without_the_load_ends_the_expectation() -> None:
    view = equal_engines()
    assert prefetch(view) is not None
    view.update(picture(*(engine_seen(f"e{n}") for n in range(4)), sequence=2), NOW + 0.3)
    view.validate()
    assert prefetch(view) is not None


def test_a_restarted_engine_has_no_expected_loads() -> None:
    view = equal_engines(1)
    assert prefetch(view) == "e0"
    view.record_sent("e0", route_request("r"), NOW)
    view.record_admitted("e0", "r", "another life", NOW)
    assert prefetch(view) == "e0"
    view.update(picture(engine_seen("e0", incarnation="a third"), sequence=2, age_s=1.0), NOW)
    view.validate()
    assert prefetch(view) == "e0"
