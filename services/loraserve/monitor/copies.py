"""Which engines hold which adapter, so that an engine that lacks it knows whom to read it from. Pure."""

from collections.abc import Iterable

from loraserve.messages import EngineCapabilities, EngineLoad, Holder
from loraserve.messages.transfer import Abilities

MOST_HOLDERS = 8
"""Named to one who asks: it tries the nearest few and then the store."""


class CopyIndex:
    """By adapter version, the engines that had it in their last report: resident, or in their host cache."""

    def __init__(self) -> None:
        self._held: dict[str, frozenset[str]] = {}
        self._holders: dict[str, dict[str, Holder]] = {}

    def report(self, load: EngineLoad, capabilities: EngineCapabilities) -> None:
        """An engine's report, in place of its last one."""
        by_version = _abilities(load, capabilities)
        held = frozenset(version for version, abilities in by_version.items() if abilities is not None)
        self._forget(load.engine, self._held.pop(load.engine, frozenset()) - held)
        if held:
            self._held[load.engine] = held
        for version, abilities in by_version.items():
            if abilities is not None:
                holder = Holder(engine=load.engine, incarnation=load.incarnation, abilities=abilities)
                self._holders.setdefault(version, {})[load.engine] = holder

    def drop(self, engine: str) -> None:
        """It is dead, or lets nobody read from it."""
        self._forget(engine, self._held.pop(engine, frozenset()))

    def holders(self, version: str, asked_by: str) -> tuple[Holder, ...]:
        """At most MOST_HOLDERS, without the one that asks. Which ones differs by who asks, so that readers spread."""
        others = [holder for name, holder in sorted(self._holders.get(version, {}).items()) if name != asked_by]
        first = sum(asked_by.encode()) % len(others) if others else 0
        return tuple((others[first:] + others[:first])[:MOST_HOLDERS])

    def validate(self) -> None:
        """Both ways of looking at it agree; raises AssertionError."""
        pairs = {(version, engine) for engine, held in self._held.items() for version in held}
        assert pairs == {(version, engine) for version, found in self._holders.items() for engine in found}
        assert all(self._holders.values()), "a version without holders is kept"

    def _forget(self, engine: str, versions: Iterable[str]) -> None:
        for version in versions:
            found = self._holders[version]
            del found[engine]
            if not found:
                del self._holders[version]


def _abilities(load: EngineLoad, capabilities: EngineCapabilities) -> dict[str, Abilities | None]:
    """Where an adapter is in the pool and in the host cache, those of the pool if that can be read at all: as the
    engine itself chooses."""
    abilities = capabilities.abilities
    of_pool: dict[str, Abilities | None] = {adapter.version: abilities for adapter in load.adapters.resident}
    of_cache: dict[str, Abilities | None] = dict.fromkeys(load.adapters.cached, capabilities.cache_abilities)
    readable = abilities is not None and abilities.transports
    return of_cache | of_pool if readable else of_pool | of_cache
