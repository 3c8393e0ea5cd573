"""The gateway process: serves HTTP and communicates with the cluster over the bus."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from aiohttp import web

from loraserve.bus.protocol import Bus, Envelope
from loraserve.clock import Clock
from loraserve.config import Config
from loraserve.errors import ConfigError
from loraserve.gateway.api.app import make_app
from loraserve.gateway.context import Gateway
from loraserve.gateway.errors import unavailable
from loraserve.gateway.metrics import ClusterCollector, GatewayMetrics, StreamCollector
from loraserve.gateway.probe import EngineProbe
from loraserve.gateway.registry import STORE, RegistryCopy
from loraserve.gateway.streams import StreamTable
from loraserve.gateway.text.tokenizer import ModelTokenizer
from loraserve.listener import BACKLOG, open_listener, port_error
from loraserve.messages import (
    ClusterLoad,
    ClusterStatistics,
    EngineGone,
    Failed,
    MetricsTold,
    RegistryChanged,
    TellMetrics,
    ToGateway,
    TokenBatch,
)
from loraserve.metrics import Metrics
from loraserve.service import Service

MONITOR = "monitor"
KEEPALIVE_S = 75.0
LAST_ANSWERS_S = 2.0
DRAIN_POLL_S = 0.02


class GatewayService(Service):
    """Creates and runs the gateway. ``port`` is the bound port, even if gateway.port in the configuration is 0."""

    inbox = ToGateway
    starting_detail = "loading the tokenizer"
    gateway: Gateway
    port: int
    _site: web.SockSite
    _server: web.Server

    def __init__(self, config: Config, bus: Bus, clock: Clock) -> None:
        super().__init__(config, bus, clock)
        self.drain_timeout_s = config.gateway.drain_timeout_s + LAST_ANSWERS_S + 1.0

    async def start(self, stack: AsyncExitStack) -> None:
        """Start serving. Raises ConfigError if the port, host or model directory cannot be used."""
        # Bind first, so that an unusable port is reported before the slow loading of the tokenizer.
        listener = stack.enter_context(open_listener(self.config))
        directory = model_dir(self.config.model.path)
        tokenizer = await asyncio.to_thread(ModelTokenizer, directory)
        stack.callback(tokenizer.close)
        self.gateway = self._gateway(tokenizer, self.config.model.name or directory.name)
        self.story = self.gateway.stories.story
        self.bus.subscribe(MONITOR, "load")
        self.bus.subscribe(MONITOR, "gone")
        self.bus.subscribe(MONITOR, "statistics")
        self.bus.subscribe(STORE, "registry")
        await self.gateway.registry.refresh()
        runner = web.AppRunner(
            make_app(self.gateway),
            # Cancel the handler when its client disconnects. That aborts the requests on the engines.
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=KEEPALIVE_S,
            shutdown_timeout=LAST_ANSWERS_S,
        )
        await runner.setup()
        assert runner.server is not None
        self._server = runner.server
        stack.push_async_callback(runner.cleanup)
        self._site = web.SockSite(runner, listener, backlog=BACKLOG)
        self.port = listener.getsockname()[1]
        try:
            await self._site.start()
        except OSError as error:
            raise port_error(error, self.port) from error
        self.log.info("listening", host=self.config.gateway.host, port=self.port)

    def ready_detail(self) -> str:
        return f"listening on {self.config.gateway.host}:{self.port}, {len(self.gateway.streams)} streams"

    def story_subjects(self, subjects: Sequence[str]) -> Sequence[str]:
        stories, adapters = self.gateway.stories, self.gateway.registry.adapters
        return list(dict.fromkeys(found for id_ in subjects for found in stories.subjects(id_, adapters)))

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        dead_after_s = self.config.monitor.dead_after_s
        return [EngineProbe(self.bus, self.clock, self.gateway.streams, dead_after_s, self.spawn).run()]

    async def handle(self, envelope: Envelope) -> None:
        now = self.clock.monotonic_s()
        streams = self.gateway.streams
        match envelope.message:
            case TokenBatch() as batch:
                for request_id in streams.on_batch(batch, now):
                    self.gateway.abort(batch.engine, request_id, "unknown_request")
            case Failed() as failed:
                streams.on_failed(failed)
            case ClusterLoad() as load:
                streams.on_cluster_load(load, now)
            case EngineGone() as gone:
                streams.on_engine_gone(gone)
            case ClusterStatistics(engines=counters):
                streams.watch.note_statistics(counters)
            case TellMetrics():
                self.bus.respond(envelope, MetricsTold(text=self.metrics.render().decode()))
            case RegistryChanged() as registry:
                self.gateway.registry.update(registry)

    async def drain(self) -> None:
        """Accept no more connections and finish the requests on the open ones.

        Connections that were idle for a while are closed. After the timeout, requests are ended with an error.
        """
        self.gateway.connections.drain(self.clock.monotonic_s())
        await self._site.stop()
        await self._finish(lambda: not self._server.connections, self.config.gateway.drain_timeout_s)
        self.gateway.refuses_requests = True
        self.gateway.streams.fail_all(unavailable("This gateway is shutting down; try again", "shutting_down"))
        await self._finish(lambda: not self.gateway.connections.requests, LAST_ANSWERS_S)

    async def _finish(self, is_finished: Callable[[], bool], timeout_s: float) -> None:
        """Close idle connections until the condition holds, or the timeout."""
        deadline_s = self.clock.monotonic_s() + timeout_s
        while not is_finished() and (now := self.clock.monotonic_s()) < deadline_s:
            for connection in self.gateway.connections.closable(self._server.connections, now):
                connection.force_close()
            await asyncio.sleep(DRAIN_POLL_S)

    def _gateway(self, tokenizer: ModelTokenizer, model_name: str) -> Gateway:
        streams = StreamTable(self.config.monitor.dead_after_s, self.config.gateway.max_attempts)
        registry = RegistryCopy(self.bus, self.clock)
        self.metrics.registry.register(StreamCollector(streams))
        # Every gateway has the same figures of the cluster. They are kept apart, so that they are not added up.
        cluster_metrics = Metrics()
        cluster_metrics.registry.register(
            ClusterCollector(streams.watch, registry, self.clock, model_name, self.config.engine.max_adapters)
        )
        return Gateway(
            config=self.config,
            bus=self.bus,
            clock=self.clock,
            log=self.log,
            model_name=model_name,
            tokenizer=tokenizer,
            registry=registry,
            streams=streams,
            metrics=GatewayMetrics(self.metrics, model_name),
            render_metrics=self.metrics.render,
            render_cluster_metrics=cluster_metrics.render,
            started_unix_s=self.clock.unix_s(),
        )


def model_dir(path: str) -> Path:
    """Return the absolute path of the model directory. Raises ConfigError if none is configured."""
    if not path:
        raise ConfigError("model.path is empty; name a Hugging Face model directory with --set model.path=DIR")
    return Path(path).expanduser().absolute()
