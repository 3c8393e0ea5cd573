"""State and connections that all HTTP handlers of one gateway share."""

import asyncio
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from loraserve.bus.protocol import Bus
from loraserve.clock import Clock
from loraserve.config import Config
from loraserve.gateway.connections import Connections
from loraserve.gateway.errors import bad_request, unavailable
from loraserve.gateway.metrics import GatewayMetrics
from loraserve.gateway.migration import Quarantine
from loraserve.gateway.registry import RegistryCopy
from loraserve.gateway.story import RequestStories
from loraserve.gateway.streams import StreamTable
from loraserve.gateway.text.tokenizer import ModelTokenizer
from loraserve.log import Logger
from loraserve.messages import Abort, AdapterRef, Expect

ROUTER = "router"
CHARACTERS_PER_TOKEN = 4
"""Rough average for English text."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model that a request names: one version of an adapter, or the base model if ``adapter`` is None."""

    name: str
    adapter: AdapterRef | None

    @property
    def version(self) -> str | None:
        return self.adapter.version if self.adapter else None


@dataclass(slots=True)
class Gateway:
    config: Config
    bus: Bus
    clock: Clock
    log: Logger
    model_name: str
    tokenizer: ModelTokenizer
    registry: RegistryCopy
    streams: StreamTable
    metrics: GatewayMetrics
    render_metrics: Callable[[], bytes]
    render_cluster_metrics: Callable[[], bytes]
    started_unix_s: float
    stories: RequestStories = field(default_factory=RequestStories)
    quarantine: Quarantine = field(default_factory=Quarantine)
    trial: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while one suspect of having killed engines is tried (see ``gateway.migration``)."""
    connections: Connections = field(default_factory=Connections)
    refuses_requests: bool = False
    """Set at the end of the drain, when a new request could not finish."""

    @contextmanager
    def active(self, connection: Hashable) -> Iterator[None]:
        """Count one HTTP request of this connection as in progress inside the block."""
        self.connections.begin(connection)
        try:
            yield
        finally:
            self.connections.end(connection, self.clock.monotonic_s())

    async def resolve(self, model: str | None) -> ServedModel:
        """Return the model with this name. Raises ApiError 400 (no name), 404 (unknown) or 503 (store silent)."""
        if not model:
            message = "model: name the model or adapter to use; GET /v1/models lists them"
            raise bad_request(message, "model", "missing_required_parameter")
        if model == self.model_name:
            return ServedModel(model, None)
        return ServedModel(model, await self.registry.resolve(model))

    def context_tokens(self) -> int:
        """Return the context length in tokens: the smallest limit of configuration, model and live engines.

        Raises ApiError 503 while no limit is known.
        """
        reports = self.streams.watch.reports.values()
        engines = [report.capabilities.max_model_tokens for report in reports if report.alive]
        limits = (self.config.model.max_model_tokens, self.tokenizer.max_positions, *engines)
        known = [limit for limit in limits if limit]
        if not known:
            raise unavailable("No engine has reported the model's context length yet; try again", "no_engine")
        return min(known)

    def announce(self, model: ServedModel, characters: int) -> None:
        """Announce a long prompt to the router, so that an engine can load the adapter during tokenization."""
        if model.adapter is not None and characters >= self.config.gateway.expect_characters:
            tokens = characters // CHARACTERS_PER_TOKEN
            self.bus.send(ROUTER, Expect(adapter=model.adapter, prompt_tokens=tokens))

    def abort(self, engine: str, request_id: str, reason: str) -> None:
        """Tell an engine to drop a request. ``reason`` is a label of the metric that counts aborts."""
        self.metrics.aborts.labels(reason).inc()
        self.tell_story(request_id, f"aborted on {engine}: {reason}")
        self.bus.send(engine, Abort(request_id=request_id))

    def tell_story(self, request_id: str, what: str) -> None:
        self.stories.story.tell(request_id, self.clock.monotonic_s(), what)


GATEWAY = web.AppKey("gateway", Gateway)
REQUEST_ID = web.RequestKey("request_id", str)
ARRIVED_S = web.RequestKey("arrived_s", float)
