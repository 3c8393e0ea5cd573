"""What a routing policy is asked with and what it answers. Pure."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import msgspec

from loraserve.messages import Plan, Rejected, Route


class Seconds(msgspec.Struct, frozen=True, gc=False):
    """A prediction by its parts. ``load_s`` and ``queue_s`` pass at the same time; then comes ``own_s``.

    ``queue_s``: what is before it there, a place in the batch and room in the KV cache. ``load_s``: of an absent
    adapter. ``own_s``: its own prefill, ``step_s`` of which is what the steps that carry it take for all else.
    ``engine_s``: engine time that it takes over all of its life, and what others there lose by it.
    """

    queue_s: float
    load_s: float
    own_s: float
    step_s: float
    engine_s: float


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """An engine that can serve the request, its predicted time to first token, and why it would be chosen.

    ``why``: ``base`` (no adapter), ``planned`` (holds a copy by plan, or its load has begun), ``resident`` (the same by
    chance), ``spill`` (others hold it, but this one starts sooner), ``load`` (nobody holds it), ``prefix`` (it computed
    the beginning of this prompt before, and would not be the best otherwise), ``live`` (has the request already).
    """

    engine: str
    predicted_s: float
    why: str
    parts: Seconds | None = None

    @property
    def reason(self) -> str:
        """For people; made when asked for."""
        parts = self.parts
        if parts is None:
            return self.why
        return (
            f"{self.why}: first token in {self.predicted_s:.3f} s (queue {parts.queue_s:.3f}, load {parts.load_s:.3f}, "
            f"steps {parts.step_s:.3f}, prefill {parts.own_s - parts.step_s:.3f}; engine time {parts.engine_s:.3f})"
        )


class Choice(msgspec.Struct, frozen=True):
    """Engines to try, best first. ``others`` are looked for when asked for: nearly always the first takes it."""

    first: Candidate
    others: Callable[[], tuple[Candidate, ...]] = tuple

    def __iter__(self) -> Iterator[Candidate]:
        yield self.first
        yield from self.others()

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return tuple(self)


class Slo(msgspec.Struct, frozen=True):
    """A request is refused where the soonest first token is later than ``reject_factor`` times what was promised:
    ``ttft_s``, or its own prefill and load where those alone take longer."""

    ttft_s: float
    reject_factor: float


class Rng(Protocol):
    """As random.Random."""

    def random(self) -> float: ...


def rejected(request: Route, code: str, message: str, retry_after_s: float = 1.0) -> Rejected:
    """Nobody is told to come back at once."""
    return Rejected(request_id=request.request_id, code=code, message=message, retry_after_s=max(1.0, retry_after_s))


# MERGED: loraserve.router.context
# """A plan as the router looks it up. Pure."""


_NOWHERE: Mapping[str, float] = {}


class PlannedCopies:
    """The share of traffic of each copy."""

    def __init__(self, plan: Plan) -> None:
        self.epoch = plan.epoch
        self._shares: dict[str, dict[str, float]] = {}
        for copy in plan.placements:
            self._shares.setdefault(copy.version, {})[copy.engine] = copy.share

    def of(self, version: str) -> Mapping[str, float]:
        """Share by engine of one adapter's copies."""
        return self._shares.get(version, _NOWHERE)


def shares_of(plan: PlannedCopies | None, request: Route) -> Mapping[str, float]:
    """Share by engine of the copies of the request's adapter; empty without a plan or an adapter."""
    return plan.of(request.adapter.version) if plan is not None and request.adapter is not None else _NOWHERE
