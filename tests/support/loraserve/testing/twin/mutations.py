"""Bugs to plant in the product, each of which the twin must find. They show that its checks can fail."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from loraserve.engine.adapters.pool import EvictionPolicy
from loraserve.engine.lending.leases import Leases
from loraserve.engine.schedule import sequence as sequences
from loraserve.engine.schedule.blocks import root_digest
from loraserve.engine.schedule.scheduler import Scheduler
from loraserve.engine.schedule.sequence import Sequence, SequenceState
from loraserve.gateway.generation import Generation
from loraserve.gateway.migration import Cause, Interruption
from loraserve.gateway.streams import EngineWatch, Stream, StreamTable
from loraserve.messages import Route, TokenDelta

Patch = tuple[Any, str, Any]
"""An owner, the name of its attribute, and the value to put there."""


def _change_later_routes(change: Callable[[Route], Route]) -> list[Patch]:
    """Change what migrated requests ask of the router."""
    ask = Generation._route

    async def route(self: Generation, choice: Any, stream: Stream, request: Route) -> None:
        await ask(self, choice, stream, change(request) if request.generated else request)

    return [(Generation, "_route", route)]


def forget_output() -> list[Patch]:
    """The next attempt gets the prompt without the output so far."""

    def change(route: Route) -> Route:
        prompt = route.prompt_tokens[: len(route.prompt_tokens) - route.generated]
        return msgspec.structs.replace(route, prompt_tokens=prompt, generated=min(route.generated, len(prompt) - 1))

    return _change_later_routes(change)


def count_output_as_prompt() -> list[Patch]:
    """The next attempt gets the output as a part of the prompt, so its output begins at index 0 again."""
    return _change_later_routes(lambda route: msgspec.structs.replace(route, generated=0))


def count_one_token_less() -> list[Patch]:
    """The number of output tokens in a migrated request is one too low."""
    return _change_later_routes(lambda route: msgspec.structs.replace(route, generated=route.generated - 1))


def accept_duplicates() -> list[Patch]:
    """A delta that was received before is appended again."""
    append = Stream._append

    def append_all(self: Stream, delta: TokenDelta) -> None:
        append(self, _at(delta, self.received_tokens))

    return [(Stream, "_append", append_all)]


def _at(delta: TokenDelta, index: int) -> TokenDelta:
    return msgspec.structs.replace(delta, index=index)


def ignore_lost_tokens() -> list[Patch]:
    """A gap between two deltas is not noticed."""
    on_delta = Stream.on_delta

    def take(self: Stream, engine: str, incarnation: str, delta: TokenDelta, now: float) -> bool:
        return on_delta(self, engine, incarnation, _at(delta, min(delta.index, self.received_tokens)), now)

    return [(Stream, "on_delta", take)]


def ignore_dead_engines() -> list[Patch]:
    """The gateway does not notice that an engine has died."""
    return [
        (StreamTable, "_end", lambda self, engine, incarnation, why: None),
        (StreamTable, "on_no_answer", lambda self, engine, incarnation, asked_s: None),
        (EngineWatch, "death_of", lambda self, engine, incarnation, routed_s, now: None),
    ]


def give_up_after_deaths() -> list[Patch]:
    """A request whose engine died is not migrated, as in earlier releases."""
    interrupt = Stream.interrupt

    def fail(self: Stream, interruption: Interruption) -> bool:
        if interruption.cause is not Cause.DIED:
            return interrupt(self, interruption)
        self.fail(interruption.error)
        return False

    return [(Stream, "interrupt", fail)]


def never_release_leases() -> list[Patch]:
    """Leases do not end when their readers release them or are silent."""
    return [
        (Leases, "release", lambda self, reader, lease_id, now: True),
        (Leases, "expire", lambda self, now: None),
    ]


def keep_pins() -> list[Patch]:
    """A request that is aborted while it runs keeps its pin on the adapter."""

    def stop_running(self: Scheduler, sequence: Sequence, now: float) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence.blocks)
        sequence.blocks = ()
        if sequence.version and sequence.state is not SequenceState.ENDING:
            self.residency.pool.stop_running(sequence.version, now)

    return [(Scheduler, "_stop_running", stop_running)]


def share_blocks_between_adapters() -> list[Patch]:
    """The keys of the prefix cache do not contain the adapter."""
    root = root_digest("")
    return [(sequences, "root_digest", lambda version: root)]


def evict_running_adapters() -> list[Patch]:
    """An adapter may be evicted while requests run with it."""

    def idle(self: EvictionPolicy, keep: Any, drop_plan_pins: bool) -> list[Any]:
        return [entry for version, entry in self._entries.items() if version not in keep and entry.is_complete]

    return [(EvictionPolicy, "_idle", idle)]


MUTATIONS: dict[str, Callable[[], list[Patch]]] = {
    make.__name__: make
    for make in (
        forget_output,
        count_output_as_prompt,
        count_one_token_less,
        accept_duplicates,
        ignore_lost_tokens,
        ignore_dead_engines,
        give_up_after_deaths,
        never_release_leases,
        keep_pins,
        share_blocks_between_adapters,
        evict_running_adapters,
    )
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Plant a bug for the duration of the block; none if the name is ""."""
    patches = MUTATIONS[name]() if name else []
    before = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in patches]
    for owner, attribute, value in patches:
        setattr(owner, attribute, value)
    try:
        yield
    finally:
        for owner, attribute, value in before:
            setattr(owner, attribute, value)
