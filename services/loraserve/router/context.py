"""The input (``RoutingContext``) and the output (``Candidates``) of a routing policy."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import msgspec

from loraserve.cost import CostModel
from loraserve.messages import Plan, Route
from loraserve.router.view import ClusterView


class PlannedCopies:
    """The copies of a plan, indexed by adapter version."""

    def __init__(self, plan: Plan) -> None:
        self.epoch = plan.epoch
        self._shares: dict[str, dict[str, float]] = {}
        for copy in plan.placements:
            self._shares.setdefault(copy.version, {})[copy.engine] = copy.share

    def shares(self, version: str) -> Mapping[str, float]:
        """Return the traffic share of each planned copy of an adapter, by engine name."""
        return self._shares.get(version, {})


class Slo(msgspec.Struct, frozen=True):
    """The target of the time to first token (TTFT).

    The router refuses a request if its predicted TTFT at every engine exceeds ``reject_factor`` times the target (exact
    rule: ``policy._reject_overloaded``).
    """

    ttft_s: float
    reject_factor: float


class Rng(Protocol):
    """The method of ``random.Random`` that policies use."""

    def random(self) -> float: ...


class RoutingContext(msgspec.Struct, frozen=True, gc=False):
    """All inputs of the routing decision for one request."""

    request: Route
    view: ClusterView
    plan: PlannedCopies | None
    cost: CostModel
    slo: Slo
    rng: Rng

    def planned_shares(self) -> Mapping[str, float]:
        """Return the traffic share of each planned copy of the request's adapter, by engine name."""
        if self.plan is None or self.request.adapter is None:
            return {}
        return self.plan.shares(self.request.adapter.version)


class Prediction(msgspec.Struct, frozen=True, gc=False):
    """The terms of a predicted TTFT, which is max(``queue_s``, ``load_s``) + ``own_s``.

    Attributes:
        queue_s: Wait for queued prefill, a place in the batch and KV memory.
        load_s: Time until the adapter is resident.
        own_s: Time of all steps with the request's own prefill.
        step_s: Time that these steps would take without this prefill.
        engine_s: Engine time of the request until its end, including the delay of other requests.
    """

    queue_s: float
    load_s: float
    own_s: float
    step_s: float
    engine_s: float


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """An engine that can serve the request, its predicted TTFT in seconds (``predicted_s``), and why it was chosen.

    ``why`` is one of:

    - ``base``: the request uses no adapter;
    - ``planned``: the engine holds or loads the adapter, and the plan has a copy there;
    - ``resident``: the engine holds or loads the adapter, and the plan has no copy there;
    - ``spill``: other engines hold the adapter, but this one was preferred;
    - ``load``: no engine holds the adapter;
    - ``prefix``: the engine has cached a prefix of the prompt, and would not have the best score without prefix caches;
    - ``live``: the engine runs the request already.
    """

    engine: str
    predicted_s: float
    why: str
    prediction: Prediction | None = None

    @property
    def reason(self) -> str:
        """One line that explains the choice, for logs and stories."""
        parts = self.prediction
        if parts is None:
            return self.why
        return (
            f"{self.why}: first token in {self.predicted_s:.3f} s (queue {parts.queue_s:.3f}, load {parts.load_s:.3f}, "
            f"steps {parts.step_s:.3f}, prefill {parts.own_s - parts.step_s:.3f}; engine time {parts.engine_s:.3f})"
        )


class Candidates(msgspec.Struct, frozen=True):
    """Engines to ask, best first. ``others`` is called only if the first engine does not admit the request."""

    first: Candidate
    others: Callable[[], tuple[Candidate, ...]] = tuple

    def __iter__(self) -> Iterator[Candidate]:
        yield self.first
        yield from self.others()
