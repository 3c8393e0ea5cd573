"""The input (``RoutingContext``) and the output (``Candidates``) of a routing policy."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import msgspec

from loraserve.cost import CostModel
from loraserve.messages import Plan, Rejected, Route
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
    """The promised time to first token (TTFT), and how far the predicted time may exceed it.

    A request is refused if every engine needs more than ``reject_factor`` times the promise. The promise is
    ``ttft_s``, or the time of the request's own prefill and adapter load if that is longer.
    """

    ttft_s: float
    reject_factor: float


class Rng(Protocol):
    """The methods of ``random.Random`` that policies use."""

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

    ``queue_s`` is the wait for queued prefill, a place in the batch and KV memory. ``load_s`` is the time until the
    adapter is resident. ``own_s`` is the time of all steps with the request's own prefill; ``step_s`` is the time of
    these steps without this prefill. ``engine_s`` is the engine time of the request until its end, including the delay
    of other requests.
    """

    queue_s: float
    load_s: float
    own_s: float
    step_s: float
    engine_s: float


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """An engine that can serve the request, its predicted time to first token, and why it was chosen.

    ``why`` is one of:

    - ``base``: the request uses no adapter;
    - ``planned``: the engine holds or loads the adapter, and the plan has a copy there;
    - ``resident``: the engine holds or loads the adapter, and the plan has no copy there;
    - ``spill``: other engines hold the adapter, but this one was preferred;
    - ``load``: no engine holds the adapter;
    - ``prefix``: the engine has cached a prefix of the prompt, and would not have the best score without prefix caches;
    - ``live``: the engine already runs the request.
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
    """Engines to ask, best first.

    ``others`` computes the candidates after the first one. It is called only in the rare case that the first one does
    not admit the request.
    """

    first: Candidate
    others: Callable[[], tuple[Candidate, ...]] = tuple

    def __iter__(self) -> Iterator[Candidate]:
        yield self.first
        yield from self.others()


def rejection(request: Route, code: str, message: str, retry_after_s: float = 1.0) -> Rejected:
    """Return the refusal of a request. It tells the client to wait at least one second before a retry."""
    return Rejected(request_id=request.request_id, code=code, message=message, retry_after_s=max(1.0, retry_after_s))
