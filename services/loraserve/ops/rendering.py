"""Decodes the gateway's answers about adapters, rebalances and events, and formats them as text."""

from datetime import datetime
from typing import TypeVar

import msgspec

from loraserve.messages import Move, RebalanceDone
from loraserve.ops.gateway_client import OpsError
from loraserve.text import size, table

T = TypeVar("T")

VERSION_CHARACTERS = 12
VERSION_DIGITS = 64


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of /v1/models. The base model has no ``parent``."""

    id: str
    parent: str | None = None
    version: str = ""
    rank: int = 0
    slab_bytes: int = 0


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /v1/models."""

    data: tuple[ModelCard, ...]

    def adapters(self) -> list[ModelCard]:
        return sorted((model for model in self.data if model.parent), key=lambda model: model.id)


class StoryEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a request or an adapter. ``process`` is the process that recorded the event."""

    unix_s: float
    process: str
    subject: str
    text: str


class MergedStory(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /admin/story: events of ``subjects`` by time. ``silent`` lists processes that did not answer."""

    id: str
    subjects: tuple[str, ...]
    entries: tuple[StoryEvent, ...]
    silent: tuple[str, ...] = ()


def one_line(content: bytes) -> str:
    return msgspec.json.format(content, indent=-1).decode()


def decode(content: bytes, kind: type[T]) -> T:
    """Decode an answer of the gateway. Raises OpsError if it does not have the type ``kind``."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.DecodeError as error:
        raise OpsError(f"the answer is not from a LoRAServe gateway of this version ({error}); check --url") from error


def render_adapters(adapters: list[ModelCard]) -> str:
    if not adapters:
        return "no adapter is loaded; load one with scripts/adapters load NAME DIR"
    rows = [[a.id, str(a.rank), size(a.slab_bytes), a.version[:VERSION_CHARACTERS]] for a in adapters]
    return table(["ADAPTER", "RANK", "SIZE", "VERSION"], rows)


def render_rebalance(done: RebalanceDone, dry_run: bool) -> str:
    parts = [_moves_table(done.moves)] if done.moves else []
    parts.append(_outcome(done, dry_run))
    parts += [f"failed: {problem}" for problem in done.failed]
    return "\n".join(parts)


def exit_status(done: RebalanceDone) -> int:
    """Return 1 if any part of the rebalance failed, else 0. A plan without changes is a success."""
    return 1 if done.failed else 0


def _moves_table(moves: tuple[Move, ...]) -> str:
    rows = [
        [
            move.name,
            move.source or "(new copy)",
            move.target or "(copy removed)",
            size(move.slab_bytes) if move.target else "-",
            _gain(move.gain_s),
            move.reason,
        ]
        for move in moves
    ]
    return table(["ADAPTER", "FROM", "TO", "SIZE", "GAIN", "REASON"], rows)


def _gain(gain_s: float) -> str:
    return f"{gain_s * 1000:.1f} ms" if gain_s else "-"


def _outcome(done: RebalanceDone, dry_run: bool) -> str:
    count = f"{len(done.moves)} {'move' if len(done.moves) == 1 else 'moves'}"
    loaded = size(sum(move.slab_bytes for move in done.moves))
    epoch = done.plan.epoch
    if dry_run and not done.failed:
        would = f"would make {count} and load {loaded}" if done.moves else "no adapter would move"
        return f"dry run, nothing was changed: {would}; the next epoch is {epoch}"
    if done.applied and done.moves:
        return f"epoch {epoch}: {count} made, {loaded} loaded"
    if done.applied:
        return f"epoch {epoch}: no copy moved; shares, drains and lost copies were updated"
    return f"epoch {epoch} stays in force: {done.message or 'nothing was applied'}"


def render_story(story: MergedStory) -> str:
    rows = [[_time(e.unix_s), e.process, _short(e.subject), e.text] for e in story.entries]
    text = table(["TIME", "PROCESS", "SUBJECT", "EVENT"], rows)
    if not rows:
        text = f"no process knows {story.id}; give an answer's id, its x-request-id, an adapter's name or a version"
    return text + (f"\nno answer from: {', '.join(story.silent)}" if story.silent else "")


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s).strftime("%H:%M:%S.%f")[:-3]


def _short(subject: str) -> str:
    is_version = len(subject) == VERSION_DIGITS and all(c in "0123456789abcdef" for c in subject)
    return subject[:VERSION_CHARACTERS] if is_version else subject
