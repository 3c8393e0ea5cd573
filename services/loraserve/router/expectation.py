"""Where an adapter should be on its way to while the request for it is still being made. Pure."""

from loraserve.cost import CostModel
from loraserve.messages import Expect, Rejected, Route, SamplingParams
from loraserve.router.choice import Rng, Slo
from loraserve.router.policy import route
from loraserve.router.shares import PlannedCopies
from loraserve.router.view import ClusterView

UNKNOWN = SamplingParams(max_tokens=1 << 30)
"""Its output is taken to be as long as the mean."""


def expected_at(
    expect: Expect, view: ClusterView, plan: PlannedCopies | None, cost: CostModel, slo: Slo, rng: Rng
) -> str | None:
    """The engine where such a request would go now; None where the adapter is there or on its way, and where it would
    be refused. Nothing is known of the prompt's text, so that no engine is taken to know its beginning."""
    nobody = Route(
        request_id="",
        gateway="",
        prompt_tokens=(-1,) * max(1, expect.prompt_tokens),
        sampling=UNKNOWN,
        adapter=expect.adapter,
    )
    choice = route(nobody, view, plan, cost, slo, rng)
    if isinstance(choice, Rejected):
        return None
    engine = choice.first.engine
    return None if view.engines[engine].has(expect.adapter.version) else engine
