"""What changes between two plans, as moves with reasons. Pure."""

from collections.abc import Iterable, Mapping, Sequence

from loraserve.messages import AdapterRef, Move, Placement
from loraserve.planner.gains import Outlook


def diff(
    current: Sequence[Placement],
    target: Sequence[Placement],
    adapters: Mapping[str, AdapterRef],
    outlook: Outlook | None = None,
) -> list[Move]:
    """Copies that appear, go, or change places: one that appears is paired with one of the same adapter that goes.

    With an outlook each has its predicted gain and a reason with figures; without, a reason that needs none.
    """
    before, after = _engines(current), _engines(target)
    names = {p.version: p.name for p in (*current, *target)}
    moves: list[Move] = []
    for version in sorted(before.keys() | after.keys(), key=lambda v: (names[v], v)):
        gone = sorted(before.get(version, set()) - after.get(version, set()))
        new = sorted(after.get(version, set()) - before.get(version, set()))
        slab_bytes = adapters[version].slab_bytes if version in adapters else 0
        for index in range(max(len(gone), len(new))):
            source = gone[index] if index < len(gone) else ""
            goal = new[index] if index < len(new) else ""
            reason = _reason(source, goal, version in adapters, bool(before.get(version)))
            moves.append(
                Move(
                    version=version,
                    name=names[version],
                    source=source,
                    target=goal,
                    slab_bytes=slab_bytes if goal else 0,
                    reason=reason,
                )
            )
    return outlook.priced(moves, current, target) if outlook else moves


def _engines(placements: Iterable[Placement]) -> dict[str, set[str]]:
    engines: dict[str, set[str]] = {}
    for placement in placements:
        engines.setdefault(placement.version, set()).add(placement.engine)
    return engines


def _reason(source: str, goal: str, registered: bool, planned_before: bool) -> str:
    if source and goal:
        return f"{goal} carries less than {source}"
    if goal:
        return "demand is more than one engine's share" if planned_before else "asked for and planned nowhere yet"
    return "demand fits fewer copies" if registered else "the adapter is no longer registered"
