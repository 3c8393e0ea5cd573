"""Functions that compare and change the copies of adapters in plans and on engines."""

from collections.abc import Collection, Iterable, Mapping

import msgspec

from loraserve.messages import AdapterRef, EngineLoad, Placement

CopyId = tuple[str, str]
"""(engine, version)."""

SHARE_TOLERANCE = 0.05
"""Differences between shares up to this value cause no roll-out."""


def copy_id(placement: Placement) -> CopyId:
    return placement.engine, placement.version


def versions_by_engine(placements: Iterable[Placement]) -> dict[str, set[str]]:
    engines: dict[str, set[str]] = {}
    for placement in placements:
        engines.setdefault(placement.engine, set()).add(placement.version)
    return engines


def pinned_versions(load: EngineLoad) -> set[str]:
    """Return the adapter versions that are resident and pinned on the engine."""
    return {adapter.version for adapter in load.adapters.resident if adapter.pinned}


def normalise_shares(placements: Iterable[Placement]) -> tuple[Placement, ...]:
    """Return the placements with each adapter's shares scaled to sum to 1."""
    copies = list(placements)
    totals: dict[str, float] = {}
    for copy in copies:
        totals[copy.version] = totals.get(copy.version, 0.0) + copy.share
    return tuple(
        copy
        if abs(totals[copy.version] - 1) < 1e-9
        else msgspec.structs.replace(copy, share=copy.share / totals[copy.version])
        for copy in copies
    )


def shares_differ(before: Iterable[Placement], after: Iterable[Placement]) -> bool:
    """Return whether a copy that both plans contain has shares that differ by more than ``SHARE_TOLERANCE``."""
    shares = {copy_id(p): p.share for p in before}
    return any(abs(shares.get(copy_id(p), p.share) - p.share) > SHARE_TOLERANCE for p in after)


def replace_absent_copies(
    target: Iterable[Placement],
    absent: Mapping[CopyId, str],
    before: Iterable[Placement],
    engines: Collection[str],
    answered: Collection[str],
    drained: frozenset[str],
) -> tuple[Placement, ...]:
    """Return the target plan, in which copies of the plan ``before`` replace ``absent`` (failed) copies if possible.

    If the new copy of a move failed, the old copy thus stays (make-before-break). Replacements are on the ready
    ``engines``, preferably on those that are not ``drained``. An adapter that would have no copy keeps its copies on
    engines that did not answer (not in ``answered``). These engines are asked to load the copies when they return.
    """
    ready = [p for p in target if copy_id(p) not in absent]
    planned = {copy_id(p) for p in ready}
    missing = [version for _, version in absent]
    kept: list[Placement] = []
    for old in sorted(before, key=lambda p: (p.engine in drained, p.engine, p.version)):
        is_usable = copy_id(old) not in planned and copy_id(old) not in absent and old.engine in engines
        if is_usable and old.version in missing:
            missing.remove(old.version)
            kept.append(old)
    placed = {p.version for p in (*ready, *kept)}
    on_lost_engines = [old for old in before if old.version not in placed and old.engine not in answered]
    kept += [old for old in on_lost_engines if old.version in missing]
    return normalise_shares(sorted([*ready, *kept], key=lambda p: (p.name, p.version, p.engine)))


def recover_placements(engines: Iterable[EngineLoad], adapters: Mapping[str, AdapterRef]) -> tuple[Placement, ...]:
    """Rebuild a lost plan from the engines' pinned copies. All copies of an adapter get equal shares."""
    held = [(adapters[v], load.engine) for load in engines for v in sorted(pinned_versions(load)) if v in adapters]
    return normalise_shares(Placement(version=a.version, name=a.name, engine=engine, share=1.0) for a, engine in held)
