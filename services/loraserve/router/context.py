"""What a routing policy is given (``RoutingContext``) and what it answers (``Candidates``)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import msgspec

from loraserve.cost import CostModel
from loraserve.messages import Plan, Rejected, Route
from loraserve.router.view import ClusterView


class PlannedCopies:
    """A plan's copies, indexed by adapter version."""

    def __init__(self, plan: Plan) -> None:
        self.epoch = plan.epoch
        self._shares: dict[str, dict[str, float]] = {}
        for copy in plan.placements:
            self._shares.setdefault(copy.version, {})[copy.engine] = copy.share

    def shares(self, version: str) -> Mapping[str, float]:
        """Return the traffic share of each copy of an adapter, by engine name."""
        return self._shares.get(version, {})


class Slo(msgspec.Struct, frozen=True):
    """The promised time to first token and how far it may be exceeded.

    A request is refused if the soonest engine needs more than ``reject_factor`` times the promise. The promise is
    ``ttft_s``, or the time that the request's own prefill and adapter load take if that is longer.
    """

    ttft_s: float
    reject_factor: float


class Rng(Protocol):
    """The part of ``random.Random`` that policies use."""

    def random(self) -> float: ...


class RoutingContext(msgspec.Struct, frozen=True, gc=False):
    """Everything that decides where one request goes."""

    request: Route
    view: ClusterView
    plan: PlannedCopies | None
    cost: CostModel
    slo: Slo
    rng: Rng

    def planned_shares(self) -> Mapping[str, float]:
        """Return the shares of the planned copies of the request's adapter, by engine name."""
        if self.plan is None or self.request.adapter is None:
            return {}
        return self.plan.shares(self.request.adapter.version)


class Prediction(msgspec.Struct, frozen=True, gc=False):
    """The parts of a predicted time to first token, which is max(``queue_s``, ``load_s``) + ``own_s``.

    ``queue_s`` is the wait for queued prefill, a place in the batch and KV memory. ``load_s`` is the load of an absent
    adapter, during which the queue advances. ``own_s`` are all steps that carry the request's own prefill; ``step_s``
    is the part of it that they take for everything else. ``engine_s`` is the engine time that the request costs over
    its whole life, including what other requests lose by it.
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
    - ``spill``: other engines hold the adapter, but this one starts sooner;
    - ``load``: no engine holds the adapter;
    - ``prefix``: the engine has the beginning of the prompt in its prefix cache, and would not be the best without it;
    - ``live``: the engine runs the request already.
    """

    engine: str
    predicted_s: float
    why: str
    prediction: Prediction | None = None

    @property
    def reason(self) -> str:
        """The choice in one line, for logs and stories."""
        parts = self.prediction
        if parts is None:
            return self.why
        return (
            f"{self.why}: first token in {self.predicted_s:.3f} s (queue {parts.queue_s:.3f}, load {parts.load_s:.3f}, "
            f"steps {parts.step_s:.3f}, prefill {parts.own_s - parts.step_s:.3f}; engine time {parts.engine_s:.3f})"
        )


class Candidates(msgspec.Struct, frozen=True):
    """Engines to ask, best first.

    ``others`` computes the candidates after the first one. It is called only if the first one does not take the
    request, which is rare.
    """

    first: Candidate
    others: Callable[[], tuple[Candidate, ...]] = tuple

    def __iter__(self) -> Iterator[Candidate]:
        yield self.first
        yield from self.others()


def rejection(request: Route, code: str, message: str, retry_after_s: float = 1.0) -> Rejected:
    """Return the refusal of a request; clients are told to wait for at least one second before they retry."""
    return Rejected(request_id=request.request_id, code=code, message=message, retry_after_s=max(1.0, retry_after_s))
