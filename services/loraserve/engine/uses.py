"""How often each adapter was lately asked for. Pure and bounded."""

from heapq import nlargest

import msgspec

HALF_LIFE_S = 300.0
"""A request counts half after so long. Of all who halve alike the order changes only with new requests."""
MOST_VERSIONS = 4096


class _Count(msgspec.Struct):
    uses: float
    at_s: float


class Uses:
    """Requests by adapter version, older ones count less. Of too many those that were asked for least are forgotten."""

    def __init__(self, half_life_s: float = HALF_LIFE_S, most: int = MOST_VERSIONS) -> None:
        self._half_life_s = half_life_s
        self._most = most
        self._counts: dict[str, _Count] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, version: str, now: float) -> None:
        """One request more."""
        self._counts[version] = _Count(self.of(version, now) + 1.0, now)
        if len(self._counts) > self._most:
            # Half at once: to look at all of them is not the price of each request.
            kept = nlargest(max(1, self._most // 2), self._counts, key=lambda version: self.of(version, now))
            self._counts = {version: self._counts[version] for version in kept}

    def of(self, version: str, now: float) -> float:
        """0 for who was never heard of."""
        count = self._counts.get(version)
        return count.uses * 0.5 ** ((now - count.at_s) / self._half_life_s) if count else 0.0
