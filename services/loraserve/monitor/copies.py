"""Index of adapter copies: the engines from which an engine can read an adapter."""

from collections.abc import Iterable

from loraserve.messages import EngineCapabilities, EngineLoad, Holder
from loraserve.messages.transfer import Abilities

MAX_HOLDERS = 8
"""Maximum number of holders in one answer. The reader tries the nearest few and then the store."""


class CopyIndex:
    """Maps each adapter version to the engines that last reported a readable copy in their pool or host cache."""

    def __init__(self) -> None:
        self._held: dict[str, frozenset[str]] = {}
        self._holders: dict[str, dict[str, Holder]] = {}

    def report(self, load: EngineLoad, capabilities: EngineCapabilities) -> None:
        """Replace the engine's entries with those of a new report."""
        readable = {version: able for version, able in _abilities(load, capabilities).items() if able is not None}
        self._remove(load.engine, self._held.pop(load.engine, frozenset()) - readable.keys())
        if readable:
            self._held[load.engine] = frozenset(readable)
        for version, abilities in readable.items():
            holder = Holder(engine=load.engine, incarnation=load.incarnation, abilities=abilities)
            self._holders.setdefault(version, {})[load.engine] = holder

    def drop(self, engine: str) -> None:
        self._remove(engine, self._held.pop(engine, frozenset()))

    def holders(self, version: str, asked_by: str) -> tuple[Holder, ...]:
        """Return at most MAX_HOLDERS engines with a copy, except ``asked_by``. Their order depends on its name."""
        others = [holder for name, holder in sorted(self._holders.get(version, {}).items()) if name != asked_by]
        first = sum(asked_by.encode()) % len(others) if others else 0
        return tuple((others[first:] + others[:first])[:MAX_HOLDERS])

    def validate(self) -> None:
        """Check that both indexes agree. Raises AssertionError."""
        pairs = {(version, engine) for engine, held in self._held.items() for version in held}
        assert pairs == {(version, engine) for version, found in self._holders.items() for engine in found}
        assert all(self._holders.values()), "a version without holders is kept"

    def _remove(self, engine: str, versions: Iterable[str]) -> None:
        for version in versions:
            found = self._holders[version]
            del found[engine]
            if not found:
                del self._holders[version]


def _abilities(load: EngineLoad, capabilities: EngineCapabilities) -> dict[str, Abilities | None]:
    """Map each adapter version on the engine to the ``Abilities`` of its memory, or to None if peers cannot read it.

    An adapter in both the pool and the host cache has the pool's abilities if peers can read the pool.
    """
    abilities = capabilities.abilities
    in_pool: dict[str, Abilities | None] = {adapter.version: abilities for adapter in load.adapters.resident}
    in_cache: dict[str, Abilities | None] = dict.fromkeys(load.adapters.cached, capabilities.cache_abilities)
    pool_is_readable = abilities is not None and abilities.transports
    return in_cache | in_pool if pool_is_readable else in_pool | in_cache
