"""The gateway process: serves HTTP and communicates with the cluster over the bus."""

import asyncio
import errno
import socket
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from aiohttp import web

from loraserve.bus.protocol import Bus, Envelope
from loraserve.clock import Clock
from loraserve.config import Config
from loraserve.errors import ConfigError
from loraserve.gateway.api.app import make_app
from loraserve.gateway.context import Gateway
from loraserve.gateway.errors import unavailable
from loraserve.gateway.metrics import ClusterCollector, GatewayMetrics
from loraserve.gateway.registry import STORE, RegistryCopy
from loraserve.gateway.streams import StreamTable
from loraserve.gateway.text.tokenizer import ModelTokenizer
from loraserve.messages import ClusterLoad, ClusterStatistics, Failed, RegistryChanged, ToGateway, TokenBatch
from loraserve.service import Service

MONITOR = "monitor"
BACKLOG = 1024
KEEPALIVE_S = 75.0
LAST_ANSWERS_S = 2.0


class GatewayService(Service):
    """Creates and runs the gateway. ``port`` is the bound port, even if gateway.port in the configuration is 0."""

    inbox = ToGateway
    starting_detail = "loading the tokenizer"
    gateway: Gateway
    port: int
    _site: web.SockSite

    def __init__(self, config: Config, bus: Bus, clock: Clock) -> None:
        super().__init__(config, bus, clock)
        self.drain_timeout_s = config.gateway.drain_timeout_s + LAST_ANSWERS_S + 1.0

    async def start(self, stack: AsyncExitStack) -> None:
        """Start serving. Raises ConfigError if the port, host or model directory cannot be used."""
        # Bind first, so that an unusable port is reported before the slow loading of the tokenizer.
        listener = stack.enter_context(bind(self.config.gateway.host, self.config.gateway.port))
        directory = model_dir(self.config.model.path)
        tokenizer = await asyncio.to_thread(ModelTokenizer, directory)
        stack.callback(tokenizer.close)
        self.gateway = self._gateway(tokenizer, self.config.model.name or directory.name)
        self.story = self.gateway.stories.story
        self.bus.subscribe(MONITOR, "load")
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
        stack.push_async_callback(runner.cleanup)
        self._site = web.SockSite(runner, listener, backlog=BACKLOG)
        await listen(self._site, self.config.gateway.port)
        self.port = listener.getsockname()[1]
        self.log.info("listening", host=self.config.gateway.host, port=self.port)

    def ready_detail(self) -> str:
        return f"listening on {self.config.gateway.host}:{self.port}, {len(self.gateway.streams)} streams"

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
            case ClusterStatistics(engines=counters):
                streams.watch.note_statistics(counters)
            case RegistryChanged() as registry:
                self.gateway.registry.update(registry)

    async def drain(self) -> None:
        """Refuse new requests and wait for running ones. After the timeout, end them with an error."""
        self.gateway.draining = True
        await self._site.stop()
        await self._wait_idle(self.config.gateway.drain_timeout_s)
        self.gateway.streams.fail_all(unavailable("This gateway is shutting down; try again", "shutting_down"))
        await self._wait_idle(LAST_ANSWERS_S)

    async def _wait_idle(self, timeout_s: float) -> None:
        if self.gateway.active_requests:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.gateway.idle.wait(), timeout_s)

    def _gateway(self, tokenizer: ModelTokenizer, model_name: str) -> Gateway:
        streams = StreamTable(self.config.monitor.dead_after_s)
        registry = RegistryCopy(self.bus, self.clock)
        self.metrics.registry.register(
            ClusterCollector(streams, registry, self.clock, model_name, self.config.engine.max_adapters)
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
            started_unix_s=self.clock.unix_s(),
        )


def model_dir(path: str) -> Path:
    """Return the absolute path of the model directory. Raises ConfigError if none is configured."""
    if not path:
        raise ConfigError("model.path is empty; name a Hugging Face model directory with --set model.path=DIR")
    return Path(path).expanduser().absolute()


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket that does not listen yet. Raises ConfigError if the address cannot be bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, OverflowError) as error:
        raise ConfigError(f"gateway.host {host!r}, gateway.port {port}: {error}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise port_error(error, port) from error
    return listener


async def listen(site: web.SockSite, port: int) -> None:
    try:
        await site.start()
    except OSError as error:
        raise port_error(error, port) from error


def port_error(error: OSError, port: int) -> ConfigError:
    remedies = {
        errno.EADDRINUSE: "it is in use; stop what listens there, or choose another with --set gateway.port=PORT",
        errno.EACCES: "not permitted; choose a port from 1024 up with --set gateway.port=PORT",
        errno.EADDRNOTAVAIL: "gateway.host is not an address of this machine; use 127.0.0.1 or 0.0.0.0",
    }
    return ConfigError(f"gateway.port {port}: {remedies.get(error.errno or 0, str(error))}")
