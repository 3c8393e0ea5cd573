"""What a plan that is being prepared still wants in the pool, and what it could not get. Pure."""

from collections.abc import Collection

from loraserve.engine.pool import AdapterPool
from loraserve.engine.schedule.events import Instruction, PlanReady
from loraserve.messages import AdapterRef


class PlanWishes:
    """Of one plan at a time; it is answered once nothing is wanted any more."""

    def __init__(self, pool: AdapterPool) -> None:
        self._pool = pool
        self.newest_epoch = 0
        """The newest plan that was heard of, 0 before the first."""
        self._epoch: int | None = None
        self.wanted: dict[str, AdapterRef] = {}
        self._failed: dict[str, str] = {}

    def begin(self, epoch: int, adapters: Collection[AdapterRef]) -> list[Instruction]:
        """A plan that was still being prepared is given up."""
        ended = self._end("a newer plan came") if self._epoch is not None else []
        self._epoch = self.newest_epoch = epoch
        self.wanted = {adapter.version: adapter for adapter in adapters}
        self._failed = {}
        return ended

    def retire(self, epoch: int, kept: Collection[str]) -> None:
        """Nothing that a plan up to ``epoch`` wanted is wanted any more, but what is kept."""
        self.newest_epoch = max(self.newest_epoch, epoch)
        if self._epoch is not None and self._epoch <= epoch:
            for version in self.wanted.keys() - kept:
                self.fail(version, f"epoch {epoch} does without it")

    def settle(self, version: str) -> None:
        """It is resident: pinned, if it is wanted."""
        if self.wanted.pop(version, None) is not None:
            assert self._epoch is not None, "nothing is wanted but by a plan that is being prepared"
            self._pool.plan(version, True, self._epoch)

    def fail(self, version: str, message: str) -> None:
        if self.wanted.pop(version, None) is not None:
            self._failed[version] = message

    def done(self) -> list[Instruction]:
        """The answer, once there is one."""
        if self._epoch is None or self.wanted:
            return []
        done = PlanReady(self._epoch, self._failed)
        self._epoch, self._failed = None, {}
        return [done]

    def _end(self, reason: str) -> list[Instruction]:
        for version in list(self.wanted):
            self.fail(version, reason)
        return self.done()
