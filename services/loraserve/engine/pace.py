"""How fast a plan's adapters come in while requests are computed. Pure.

Whatever a load does beside steps takes from them: where steps compute on the cores, each load costs the steps beside it
some 3 ms (its messages, its copy and its digests; SmolLM2-135M, 2 cores). As fast as they go, loads of 13 MB made the
median step 35% longer; nobody waits for a plan so urgently. What a request waits for is not paced.
"""

from collections.abc import Callable

REST = 7.0
"""Times what a load took, before the next may begin."""
LONGEST_REST_S = 0.2
"""Loads that take long are of slabs so large that what they cost beside their bytes does not count; and a plan that is
prepared for ever is none."""


class Pace:
    """One load of the plan at a time, and a rest after each, for as long as steps run."""

    def __init__(self) -> None:
        self._began_s: dict[str, float] = {}
        self._rests_until_s = 0.0

    def began(self, version: str, now: float) -> None:
        """A load of the plan."""
        self._began_s[version] = now

    def look(self, is_loading: Callable[[str], bool], now: float) -> None:
        """Whatever loads no more has ended."""
        for version in [version for version in self._began_s if not is_loading(version)]:
            took_s = now - self._began_s.pop(version)
            self._rests_until_s = now + min(LONGEST_REST_S, REST * took_s)

    def allows(self, now: float, stepping: bool) -> bool:
        """Where nothing is computed there is nothing to spare."""
        return not stepping or (not self._began_s and now >= self._rests_until_s)
