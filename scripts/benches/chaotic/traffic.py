"""Sends requests for random adapters to random engines, checks every token, and resubmits if an engine is killed."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from random import Random

from harness.driver import Asked, Driver

from chaotic.cluster import Victims
from chaotic.counts import Counts
from chaotic.truth import Case

DEADLINE_S = 60.0
"""For one request with all resubmissions. Engines need about 15 s to start on a busy machine."""
PAUSE_S = 0.05


class Traffic:
    """Writes outcomes to ``counts``. ``at`` lists the (engine, adapter) pairs of the requests in flight."""

    def __init__(
        self, driver: Driver, victims: Victims, cases: Sequence[Case], rng: Random, counts: Counts, deadline_s: float
    ) -> None:
        self.at: list[tuple[str, str]] = []
        self._driver = driver
        self._victims = victims
        self._cases = cases
        self._by_adapter = _by_adapter(cases)
        self._rng = rng
        self._counts = counts
        self._deadline_s = deadline_s

    async def keep_asking(self, until: asyncio.Event) -> None:
        """Send requests one after the other until the event is set."""
        while not until.is_set():
            await self.serve(self._rng.choice(self._cases))

    async def serve_for(self, adapter: str, engine: str) -> None:
        """Send a random prompt for this adapter, first to this engine."""
        await self.serve(self._rng.choice(self._by_adapter[adapter]), engine)

    async def serve(self, case: Case, first: str = "") -> None:
        """Send a request until it succeeds or the deadline passes."""
        self._counts.requests += 1
        ends_s = time.monotonic() + self._deadline_s
        engine = first
        while (left_s := ends_s - time.monotonic()) > 0:
            candidates = self._victims.askable(case.adapter)
            if engine not in candidates:
                if not candidates:
                    await asyncio.sleep(PAUSE_S)
                    continue
                engine = self._rng.choice(candidates)
            if await self._try(case, engine, left_s):
                return
            engine = ""
            await asyncio.sleep(PAUSE_S)
        self._counts.stuck_requests += 1
        self._counts.note(
            f"a request for {case.adapter} had not ended after {self._deadline_s:.0f} s, last at {engine}"
        )

    async def _try(self, case: Case, engine: str, timeout_s: float) -> bool:
        """Send a request once. Returns False if it must be sent again."""
        place = (engine, case.adapter)
        self.at.append(place)
        try:
            adapter = self._victims.adapters[case.adapter]
            asked = await self._driver.ask(engine, adapter, case.prompt, len(case.tokens))
            ended = await self._driver.finished(asked, timeout_s)
        finally:
            self.at.remove(place)
        self._counts.tokens += len(asked.tokens)
        if not self._tokens_are_right(case, asked):
            return True
        if not ended:
            return False
        if asked.error:
            self._note_failure(asked)
            return False
        return True

    def _tokens_are_right(self, case: Case, asked: Asked) -> bool:
        """Return whether the received tokens are right. An unfinished output must be a prefix of the right one."""
        came = tuple(asked.tokens)
        wrong = sum(a != b for a, b in zip(came, case.tokens, strict=False))
        if not asked.error and asked.over.is_set():
            wrong += abs(len(case.tokens) - len(came))
        if wrong:
            self._counts.wrong_tokens += wrong
            self._counts.note(f"{asked.engine} said {came} with {case.adapter}, should say {case.tokens}")
        return not wrong

    def _note_failure(self, asked: Asked) -> None:
        """Count a failed request as resubmitted if its engine was killed, or as a fault if the engine is alive."""
        if asked.engine in self._victims.usable and not asked.error.startswith("killed"):
            self._counts.failed_requests += 1
            self._counts.note(f"{asked.engine} failed a request for {asked.adapter}: {asked.error}")
        else:
            self._counts.resubmitted += 1


def _by_adapter(cases: Sequence[Case]) -> Mapping[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case.adapter, []).append(case)
    return found
