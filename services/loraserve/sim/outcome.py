"""What came of a simulated run. Plain data, and the figures that are read off it."""

from collections.abc import Iterable
from math import ceil, inf

import msgspec


class RequestOutcome(msgspec.Struct, gc=False):
    """What one request saw."""

    index: int
    adapter: int
    arrival_s: float
    engine: str = ""
    first_token_s: float | None = None
    end_s: float | None = None
    rejected: bool = False

    @property
    def ttft_s(self) -> float:
        """Infinite where no token came."""
        return inf if self.first_token_s is None or self.rejected else self.first_token_s - self.arrival_s


class Interval(msgspec.Struct, frozen=True):
    """Between two plans; tuples have an entry for each engine. ``moves`` are copies that were brought somewhere.

    ``needed_bytes`` are of adapters that the plan or a request keeps there, ``held_bytes`` of all that are there:
    the rest leaves when room is wanted. ``rank_tokens``: tokens computed by the rank of their adapter.
    """

    time_s: float
    moves: int
    held_bytes: tuple[int, ...]
    needed_bytes: tuple[int, ...]
    rank_tokens: tuple[dict[int, int], ...]
    adapters: tuple[int, ...]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """``requests`` are those that count. A ``hopeless`` run was broken off: its P95 TTFT is far above the SLO."""

    policy: str
    engines: int
    workload: str
    rps: float
    slo_ttft_s: float
    hopeless: bool
    requests: tuple[RequestOutcome, ...]
    intervals: tuple[Interval, ...]
    all_bytes: int
    busy_share: float
    whys: dict[str, int]

    @property
    def p95_ttft_s(self) -> float:
        return inf if self.hopeless else percentile((r.ttft_s for r in self.requests), 0.95)

    @property
    def p50_ttft_s(self) -> float:
        return inf if self.hopeless else percentile((r.ttft_s for r in self.requests), 0.5)

    @property
    def goodput_rps(self) -> float:
        """Requests a second that began within the SLO; 0 where all came at once, which is no rate."""
        took_s = self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0
        met = sum(r.ttft_s <= self.slo_ttft_s for r in self.requests)
        return met / took_s if took_s > 0 else 0.0

    @property
    def decode_s(self) -> float:
        """Mean time from the first token to the end, of requests that ended."""
        times = [r.end_s - r.first_token_s for r in self.requests if r.end_s and r.first_token_s is not None]
        return sum(times) / len(times) if times else 0.0

    @property
    def rejected(self) -> int:
        return sum(r.rejected for r in self.requests)

    @property
    def bytes_share(self) -> float:
        """Adapter bytes that an engine needs to hold, as a share of all adapters', mean over engines and time."""
        return self._share([i.needed_bytes for i in self.intervals])

    @property
    def held_share(self) -> float:
        """The same of all that lies in the pools."""
        return self._share([i.held_bytes for i in self.intervals])

    @property
    def moves_per_interval(self) -> float:
        """Copies brought somewhere, after the first plan."""
        last_s = self.requests[-1].arrival_s if self.requests else 0.0
        later = [i for i in self.intervals[2:] if i.time_s <= last_s]
        return sum(i.moves for i in later) / len(later) if later else 0.0

    def _share(self, bytes_by_engine: list[tuple[int, ...]]) -> float:
        means = [sum(b) / len(b) for b in bytes_by_engine[1:]]
        return sum(means) / len(means) / self.all_bytes if means and self.all_bytes else 0.0


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least ``share`` of them do not exceed; infinite where there is none."""
    ordered = sorted(values)
    return ordered[max(0, ceil(share * len(ordered)) - 1)] if ordered else inf
