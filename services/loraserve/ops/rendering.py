"""Decodes the gateway's answers about adapters and rebalances, and renders them for a terminal. Pure."""

from datetime import datetime

import msgspec

from loraserve.messages import Move, RebalanceDone
from loraserve.ops.gateway_client import OpsError
from loraserve.text import size, table

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


class StoryEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a story, with the process that reports it."""

    unix_s: float
    process: str
    subject: str
    text: str


class MergedStory(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /admin/story: events by time, and the processes that did not answer."""

    id: str
    subjects: tuple[str, ...]
    entries: tuple[StoryEvent, ...]
    silent: tuple[str, ...] = ()


def one_line(content: bytes) -> str:
    """Return JSON without line breaks, for programs that read line by line."""
    return msgspec.json.format(content, indent=-1).decode()


def not_a_gateway(error: msgspec.DecodeError) -> OpsError:
    """Return the error for an answer that a gateway of this version would not give."""
    return OpsError(f"the answer is not from a LoRAServe gateway of this version ({error}); check --url")


def parse_adapters(content: bytes) -> list[ModelCard]:
    """Decode the answer of /v1/models into its adapters, sorted by name.

    Raises:
        OpsError: The answer is not one of a LoRAServe gateway.
    """
    try:
        models = msgspec.json.decode(content, type=ModelList).data
    except msgspec.DecodeError as error:
        raise not_a_gateway(error) from error
    return sorted((model for model in models if model.parent), key=lambda model: model.id)


def render_adapters(adapters: list[ModelCard]) -> str:
    """Return the table that scripts/adapters prints."""
    if not adapters:
        return "no adapter is loaded; load one with scripts/adapters load NAME DIR"
    rows = [[a.id, str(a.rank), size(a.slab_bytes), a.version[:VERSION_CHARACTERS]] for a in adapters]
    return table(["ADAPTER", "RANK", "SIZE", "VERSION"], rows)


def parse_rebalance(content: bytes) -> RebalanceDone:
    """Decode the answer of /admin/rebalance, drain or undrain.

    Raises:
        OpsError: The answer is not one of a LoRAServe gateway of this version.
    """
    try:
        return msgspec.json.decode(content, type=RebalanceDone)
    except msgspec.DecodeError as error:
        raise not_a_gateway(error) from error


def render_rebalance(done: RebalanceDone, dry_run: bool) -> str:
    """Return the moves as a table, the outcome, and a line for each failure."""
    parts = [_moves_table(done.moves)] if done.moves else []
    parts.append(_outcome(done, dry_run))
    parts += [f"failed: {problem}" for problem in done.failed]
    return "\n".join(parts)


def exit_status(done: RebalanceDone) -> int:
    """Return 1 if any part of the request failed. A plan that needs no change is a success."""
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


def parse_story(content: bytes) -> MergedStory:
    """Decode the answer of /admin/story.

    Raises:
        OpsError: The answer is not one of a LoRAServe gateway of this version.
    """
    try:
        return msgspec.json.decode(content, type=MergedStory)
    except msgspec.DecodeError as error:
        raise not_a_gateway(error) from error


def render_story(story: MergedStory) -> str:
    """Return a row for each event, oldest first, and a line about processes that did not answer."""
    parts = []
    if story.entries:
        rows = [[_time(e.unix_s), e.process, _short(e.subject), e.text] for e in story.entries]
        parts.append(table(["TIME", "PROCESS", "SUBJECT", "EVENT"], rows))
    else:
        parts.append(
            f"no process knows {story.id}; give the id of an answer, its x-request-id, an adapter's name or a version"
        )
    if story.silent:
        parts.append(f"no answer from: {', '.join(story.silent)}")
    return "\n".join(parts)


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s).strftime("%H:%M:%S.%f")[:-3]


def _short(subject: str) -> str:
    """Return a version as logs show it, anything else whole."""
    is_version = len(subject) == VERSION_DIGITS and all(c in "0123456789abcdef" for c in subject)
    return subject[:VERSION_CHARACTERS] if is_version else subject
