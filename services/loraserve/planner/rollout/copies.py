"""Copies of adapters, as plans name them and as engines hold them."""

from collections.abc import Collection, Iterable, Mapping

import msgspec

from loraserve.messages import AdapterRef, EngineLoad, Placement

CopyId = tuple[str, str]
"""(engine, version)."""

SHARE_TOLERANCE = 0.05
"""Shares that differ by less route traffic in practically the same way."""


def copy_id(placement: Placement) -> CopyId:
    return placement.engine, placement.version


def versions_by_engine(placements: Iterable[Placement]) -> dict[str, set[str]]:
    engines: dict[str, set[str]] = {}
    for placement in placements:
        engines.setdefault(placement.engine, set()).add(placement.version)
    return engines


def pinned_versions(load: EngineLoad) -> set[str]:
    """Return the versions that the engine holds for a plan."""
    return {adapter.version for adapter in load.adapters.resident if adapter.pinned}


def normalise_shares(placements: Iterable[Placement]) -> tuple[Placement, ...]:
    """Scale the shares of each adapter's copies so that they sum to 1."""
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
    """Return whether the share of a copy that is in both differs noticeably."""
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
    """Return the target without its ``absent`` copies, each replaced by a copy of the plan before where there is one.

    This is make-before-break: a move whose target failed is not made, so that no adapter loses its last copy.
    Replacements are on ``engines``, drained ones last. An adapter that would then have no copy at all keeps the ones
    planned on engines that were lost (did not answer): they are asked for these copies when they are back.
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
    """Return a lost plan as the engines still hold it, with equal shares for an adapter's copies."""
    held = [(adapters[v], load.engine) for load in engines for v in sorted(pinned_versions(load)) if v in adapters]
    return normalise_shares(Placement(version=a.version, name=a.name, engine=engine, share=1.0) for a, engine in held)
