"""What a rebalance did, for people. Pure."""

import msgspec

from loraserve.messages import Move, RebalanceDone
from loraserve.ops.http import OpsError
from loraserve.ops.text import size, table


def parse(content: bytes) -> RebalanceDone:
    """Raises OpsError where that is not the answer of a gateway of this version."""
    try:
        return msgspec.json.decode(content, type=RebalanceDone)
    except msgspec.DecodeError as error:
        raise OpsError(f"the answer is not a LoRAServe gateway's ({error}); see --url") from error


def render(done: RebalanceDone, dry_run: bool) -> str:
    parts = [moves_table(done.moves)] if done.moves else []
    parts.append(verdict(done, dry_run))
    parts += [f"failed: {problem}" for problem in done.failed]
    return "\n".join(parts)


def moves_table(moves: tuple[Move, ...]) -> str:
    rows = [
        [
            move.name,
            move.source or "(new copy)",
            move.target or "(copy goes)",
            size(move.slab_bytes) if move.target else "-",
            gain(move.gain_s),
            move.reason,
        ]
        for move in moves
    ]
    return table(["ADAPTER", "FROM", "TO", "SIZE", "GAIN", "REASON"], rows)


def gain(gain_s: float) -> str:
    """How much sooner requests are predicted to start; a move for memory or for a drain has none, or costs some."""
    return f"{gain_s * 1000:.1f} ms" if gain_s else "-"


def verdict(done: RebalanceDone, dry_run: bool) -> str:
    count = f"{len(done.moves)} {'move' if len(done.moves) == 1 else 'moves'}"
    brought = size(sum(move.slab_bytes for move in done.moves))
    if dry_run and not done.failed:
        would = f"would make {count} and load {brought}" if done.moves else "nothing would move"
        return f"dry run, nothing was changed: {would}; the next epoch is {done.plan.epoch}"
    if done.applied and done.moves:
        return f"epoch {done.plan.epoch}: {count} made, {brought} loaded"
    if done.applied:
        return f"epoch {done.plan.epoch}: no copy changed its place; shares, drains and lost copies were set right"
    return f"epoch {done.plan.epoch} stays: {done.message or 'nothing was applied'}"


def exit_status(done: RebalanceDone) -> int:
    """1 where anything that was asked for could not be done; a plan that is right already is success."""
    return 1 if done.failed else 0
