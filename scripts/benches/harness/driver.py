"""Drives engines over the bus, in place of gateway, router and planner."""

import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from harness.report import BenchError
from loraserve.bus.zmq import ZmqBus, open_bus
from loraserve.config import Config
from loraserve.errors import PeerError, RequestTimeoutError
from loraserve.messages import (
    Abort,
    AdapterRef,
    AdapterRegistered,
    Admit,
    Admitted,
    ClusterLoad,
    EngineLoad,
    Failed,
    Ping,
    Pong,
    Prepared,
    PreparePlan,
    RegisterAdapter,
    RetireCopies,
    RetireDone,
    SamplingParams,
    ToGateway,
    TokenBatch,
)

NAME = "gateway-0"
READY_TIMEOUT_S = 300.0
ADMIT_TIMEOUT_S = 5.0
PLAN_TIMEOUT_S = 60.0


class Asked:
    """One request at one engine, with its tokens and the time of each."""

    def __init__(self, request_id: str, engine: str, adapter: str, most: int, on_tokens: "OnTokens | None") -> None:
        self.request_id = request_id
        self.engine = engine
        self.adapter = adapter
        self.sent_s = 0.0
        self.tokens: list[int] = []
        self.times_s: list[float] = []
        self.error = ""
        self.over = asyncio.Event()
        self._most = most
        self._on_tokens = on_tokens

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.sent_s

    def add(self, index: int, tokens: Sequence[int], finish: str | None, now: float) -> None:
        if index != len(self.tokens):
            self.fail(f"lost: token {index} came when {len(self.tokens)} were there")
            return
        self.tokens += tokens
        self.times_s += [now] * len(tokens)
        if self._on_tokens is not None:
            self._on_tokens(self)
        if finish is not None:
            if len(self.tokens) > self._most:
                self.error = f"{finish} after {len(self.tokens)} tokens"
            self.over.set()

    def fail(self, error: str) -> None:
        """End the request with an error, unless it has ended."""
        if not self.over.is_set():
            self.error = error
            self.over.set()


OnTokens = Callable[[Asked], None]


class Driver:
    """Sends requests and plans to engines; see ``driving``. All methods run on one event loop."""

    def __init__(self, bus: ZmqBus) -> None:
        self._bus = bus
        self._asked: dict[str, Asked] = {}
        self._numbers = itertools.count(1)
        self._epochs: dict[str, int] = defaultdict(int)
        self.loads: dict[str, EngineLoad] = {}
        """The last published load, by engine."""
        self.loads_s: dict[str, float] = {}
        """When it was reported, by this process's clock."""
        self.step_times_s: dict[str, list[float]] = defaultdict(list)
        """By engine, when each step's tokens arrived."""

    async def ready(self, *names: str) -> None:
        """Wait until the processes are ready. Raises BenchError after ``READY_TIMEOUT_S``."""
        for name in names:
            try:
                async with asyncio.timeout(READY_TIMEOUT_S):
                    # Readiness is not published, so it must be polled.
                    while await self._state(name) != "READY":  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
            except TimeoutError as error:
                raise BenchError(f"{name} is not ready after {READY_TIMEOUT_S:.0f} s") from error

    async def register(self, name: str, folder: Path) -> AdapterRef:
        """Register a PEFT folder, given as an absolute path, with the store."""
        message = RegisterAdapter(name=name, path=str(folder), replace=True)
        answer = await self._bus.request("store", message, AdapterRegistered, PLAN_TIMEOUT_S)
        return answer.adapter

    async def ask(
        self,
        engine: str,
        adapter: AdapterRef | None,
        prompt: Sequence[int],
        tokens: int,
        on_tokens: OnTokens | None = None,
    ) -> Asked:
        """Send a request. Returns when the engine has admitted or refused it. A refusal sets ``error``."""
        request_id = f"bench-{next(self._numbers)}"
        asked = Asked(request_id, engine, adapter.name if adapter else "", tokens, on_tokens)
        self._asked[request_id] = asked
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        message = Admit(
            request_id=request_id,
            gateway=self._bus.name,
            prompt_tokens=tuple(prompt),
            sampling=sampling,
            adapter=adapter,
        )
        asked.sent_s = time.perf_counter()
        try:
            answer = await self._bus.request(engine, message, Admitted, ADMIT_TIMEOUT_S)
        except (RequestTimeoutError, PeerError) as error:
            asked.fail(f"not admitted: {error}")
        else:
            if not answer.ok:
                asked.fail(f"{answer.code}: {answer.message}")
        return asked

    async def finished(self, asked: Asked, timeout_s: float) -> bool:
        """Wait for the end of a request. Returns False on a timeout. Tokens that arrive later are ignored."""
        try:
            async with asyncio.timeout(timeout_s):
                await asked.over.wait()
        except TimeoutError:
            return False
        finally:
            self._asked.pop(asked.request_id, None)
        return True

    async def first_token_s(self, engine: str, adapter: AdapterRef | None, prompt: Sequence[int]) -> float:
        """Return the seconds until the first token of a new request. Raises BenchError if it fails."""
        asked = await self.ask(engine, adapter, prompt, 1)
        if not await self.finished(asked, PLAN_TIMEOUT_S) or asked.error:
            raise BenchError(f"{engine} gave no token: {asked.error or 'nothing came'}")
        return asked.ttft_s

    def abort(self, asked: Asked) -> None:
        """Abort a request."""
        self._asked.pop(asked.request_id, None)
        self._bus.send(asked.engine, Abort(request_id=asked.request_id))

    async def pause(self, seconds: float) -> None:
        """Wait, while tokens keep arriving."""
        await asyncio.sleep(seconds)

    async def hold(self, engine: str, adapters: Sequence[AdapterRef]) -> None:
        """Let the engine load and pin the adapters. Raises BenchError if one cannot be loaded."""
        self._epochs[engine] += 1
        message = PreparePlan(epoch=self._epochs[engine], adapters=tuple(adapters))
        answer = await self._bus.request(engine, message, Prepared, PLAN_TIMEOUT_S)
        if answer.failed:
            raise BenchError(
                f"{engine} does not hold {len(answer.failed)} adapters: {next(iter(answer.failed.values()))}"
            )

    async def unpin(self, engine: str) -> None:
        """Unpin all adapters of the engine."""
        message = RetireCopies(epoch=self._epochs[engine], keep=())
        await self._bus.request(engine, message, RetireDone, PLAN_TIMEOUT_S)

    async def fresh_load(self, engine: str) -> EngineLoad:
        """Wait for the next load report of the engine and return it."""
        asked_s = time.perf_counter()
        async with asyncio.timeout(PLAN_TIMEOUT_S):
            while self.loads_s.get(engine, 0.0) < asked_s:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return self.loads[engine]

    async def listen(self) -> None:
        while True:
            match (await self._bus.receive()).message:
                case TokenBatch() as batch:
                    self._on_batch(batch, time.perf_counter())
                case Failed(request_id=request_id, code=code, message=message):
                    if request_id in self._asked:
                        self._asked[request_id].fail(f"{code}: {message}")
                case ClusterLoad(engines=engines):
                    now = time.perf_counter()
                    self.loads = {seen.load.engine: seen.load for seen in engines if seen.alive}
                    self.loads_s = {seen.load.engine: now - seen.age_s for seen in engines if seen.alive}

    async def _state(self, name: str) -> str:
        try:
            return (await self._bus.request(name, Ping(), Pong, 1.0)).state
        except (RequestTimeoutError, PeerError):
            return ""

    def _on_batch(self, batch: TokenBatch, now: float) -> None:
        self.step_times_s[batch.engine].append(now)
        for delta in batch.deltas:
            asked = self._asked.get(delta.request_id)
            if asked is not None:
                asked.add(delta.index, delta.tokens, delta.finish, now)


@asynccontextmanager
async def driving(config: Config, name: str = NAME) -> AsyncIterator[Driver]:
    """Connect a Driver to the engines of this configuration and to the monitor's publications."""
    bus = open_bus(config, name, ToGateway)
    bus.subscribe("monitor", "load")
    driver = Driver(bus)
    listening = asyncio.create_task(driver.listen())
    try:
        yield driver
    finally:
        listening.cancel()
        await bus.close()
