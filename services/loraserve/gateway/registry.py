"""The gateway's copy of the store's registry, which maps each adapter name to a version."""

import asyncio

from loraserve.bus.protocol import Bus
from loraserve.clock import Clock
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.gateway.errors import model_not_found, unavailable
from loraserve.messages import AdapterList, AdapterRef, ListAdapters, RegistryChanged

STORE = "store"
ASK_TIMEOUT_S = 1.0
ASK_INTERVAL_S = 0.2


class RegistryCopy:
    """A copy of the registry, updated by the store's publications. Asks the store about unknown names."""

    def __init__(self, bus: Bus, clock: Clock) -> None:
        self.revision = -1
        """The revision of the copy, or -1 before the store's first answer or publication."""
        self._adapters: dict[str, AdapterRef] = {}
        self._bus = bus
        self._clock = clock
        self._asking: asyncio.Task[None] | None = None
        self._asked_s = -ASK_INTERVAL_S

    @property
    def adapters(self) -> list[AdapterRef]:
        return sorted(self._adapters.values(), key=lambda adapter: adapter.name)

    def name_of(self, version: str) -> str:
        """Return a name registered for the version, or the version itself if there is none."""
        return next((adapter.name for adapter in self._adapters.values() if adapter.version == version), version)

    def update(self, news: RegistryChanged | AdapterList) -> None:
        """Replace the copy, unless ``news`` has an older revision."""
        if news.revision >= self.revision:
            self.revision = news.revision
            self._adapters = {adapter.name: adapter for adapter in news.adapters}

    async def resolve(self, name: str) -> AdapterRef:
        """Return the adapter with this name. Raises ApiError 404, or 503 if the store has never answered."""
        if name not in self._adapters:
            await self.refresh()
        if name in self._adapters:
            return self._adapters[name]
        if self.revision < 0:
            message = "The adapter store does not answer, so only the base model can be used; try again"
            raise unavailable(message, "no_store")
        raise model_not_found(name)

    async def refresh(self) -> None:
        """Ask the store for the registry. Calls made before the request is sent share it. A timeout changes nothing."""
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
        await asyncio.shield(self._asking)

    async def _ask(self) -> None:
        await asyncio.sleep(max(0.0, self._asked_s + ASK_INTERVAL_S - self._clock.monotonic_s()))
        # Calls made after this request is sent may need a newer registry, so they send another request.
        self._asking = None
        self._asked_s = self._clock.monotonic_s()
        try:
            self.update(await self._bus.request(STORE, ListAdapters(), AdapterList, ASK_TIMEOUT_S))
        except (RequestTimeoutError, PeerError):
            return
