"""Decides what happens to a request whose attempt on an engine failed. Pure.

A request runs in attempts. If an attempt fails for a reason that another engine may not have, the gateway migrates the
request: the next attempt computes the KV of the prompt and of the output so far, and continues the output.

A request may itself kill its engines or fail their steps, for example with an input that crashes a kernel. Without
protection it would end all engines, one after the other. A request is a *suspect* if this happened twice while it ran
and it got no token in between. A single suspect whose engines ended is quarantined. If several requests may have become
suspects together, they are tried one at a time: a suspect whose engine ends during its trial is quarantined, and one
whose step fails again is given up.
"""

import hashlib
from array import array
from collections import OrderedDict
from enum import Enum

import msgspec

from loraserve.gateway.errors import ApiError
from loraserve.messages import Route

QUARANTINE_S = 600.0
MAX_QUARANTINED = 1024


class Cause(Enum):
    """Why an attempt ended early."""

    DIED = "died"
    """The engine's process ended."""
    SILENT = "silent"
    """The engine stopped reporting. It may still run."""
    LOST = "lost"
    """Tokens were lost on the way."""
    REFUSED = "refused"
    """The engine reported that it cannot finish the request."""
    STEP_FAILED = "step_failed"
    """The engine could not compute a step with the request."""


class Interruption(msgspec.Struct, frozen=True):
    """The early end of an attempt. ``error`` is for the client, if no other attempt follows."""

    cause: Cause
    engine: str
    error: ApiError


class Verdict(Enum):
    MIGRATE = "migrate"
    TRY_ALONE = "try_alone"
    QUARANTINE = "quarantine"
    GIVE_UP = "give_up"


FATAL = (Cause.DIED, Cause.STEP_FAILED)
"""The causes of which a request may itself be the reason."""

FINAL_CODES = frozenset(("bad_request", "context_length"))
"""Codes of refusals that every engine would give."""


def may_migrate(code: str, received_tokens: int) -> bool:
    """Return whether another engine may finish a request that its engine failed with ``code``.

    Output that was computed with a damaged adapter may be wrong, so it is not continued.
    """
    return code not in FINAL_CODES and not (code == "adapter_damaged" and received_tokens)


class Attempts:
    """The attempts of one request. ``number`` is 0 for the first.

    ``failed`` counts those that failed. An engine that made progress and then handed the request over, because it
    drains, did not fail it. So a long request outlives any number of planned restarts.
    """

    def __init__(self, max_attempts: int) -> None:
        self.number = 0
        self.failed = 0
        self.on_trial = False
        self._max_attempts = max_attempts
        self._avoid: dict[str, None] = {}
        self._last: Interruption | None = None
        self._received_tokens = 0
        self._tokens_at_fatal: int | None = None
        self._is_suspect = False

    @property
    def avoid(self) -> tuple[str, ...]:
        """The engines that failed the request."""
        return tuple(self._avoid)

    def note(self, interruption: Interruption, received_tokens: int) -> bool:
        """Record the end of an attempt. Returns whether the request has become a suspect."""
        if interruption.cause is not Cause.LOST:
            self._avoid[interruption.engine] = None
        self._last = interruption
        made_progress, self._received_tokens = received_tokens > self._received_tokens, received_tokens
        self.failed += not (made_progress and interruption.cause is Cause.REFUSED)
        is_fatal = interruption.cause in FATAL
        self._is_suspect = is_fatal and received_tokens == self._tokens_at_fatal
        if is_fatal:
            self._tokens_at_fatal = received_tokens
        return self._is_suspect

    def decide(self, suspects: int) -> Verdict:
        """Return what follows, and count the next attempt. ``suspects`` requests became suspects together."""
        if self._is_suspect and self._last is not None:
            if self._last.cause is Cause.DIED and (self.on_trial or suspects == 1):
                return Verdict.QUARANTINE
            if self._last.cause is Cause.STEP_FAILED and self.on_trial:
                return Verdict.GIVE_UP
        if self.failed >= self._max_attempts:
            return Verdict.GIVE_UP
        self.number += 1
        return Verdict.TRY_ALONE if self._is_suspect else Verdict.MIGRATE


class Quarantine:
    """The requests that killed engines. An equal request is refused for QUARANTINE_S. The table is bounded."""

    def __init__(self) -> None:
        self._until_s: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until_s)

    def add(self, route: Route, now: float) -> None:
        self._until_s[fingerprint(route)] = now + QUARANTINE_S
        while len(self._until_s) > MAX_QUARANTINED:
            self._until_s.popitem(last=False)

    def check(self, route: Route, now: float) -> None:
        """Raise ApiError 422 if an equal request is in quarantine."""
        while self._until_s and next(iter(self._until_s.values())) <= now:
            self._until_s.popitem(last=False)
        if self._until_s and fingerprint(route) in self._until_s:
            raise quarantined()


def quarantined() -> ApiError:
    text = (
        "Engines that ran this request ended without finishing it, so it is not tried again for "
        f"{QUARANTINE_S / 60:.0f} minutes; change the request, or look for the cause in the engines' logs"
    )
    return ApiError(422, text, code="request_quarantined")


def fingerprint(route: Route) -> bytes:
    """Return a digest of what an engine computes: the adapter, the prompt and the sampling parameters but the seed."""
    sampling = msgspec.structs.replace(route.sampling, seed=0)
    version = route.adapter.version if route.adapter is not None else ""
    digest = hashlib.blake2b(msgspec.msgpack.encode((version, sampling)), digest_size=16)
    prompt = route.prompt_tokens
    digest.update(array("q", prompt[: len(prompt) - route.generated]).tobytes())
    return digest.digest()
