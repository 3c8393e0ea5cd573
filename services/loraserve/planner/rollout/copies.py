"""Copies of adapters as engines hold them and as plans name them. Pure."""

from collections.abc import Collection, Iterable, Mapping

import msgspec

from loraserve.messages import AdapterRef, EngineLoad, Placement

Copy = tuple[str, str]
"""(engine, version)."""

SHARE_NOISE = 0.05
"""Shares that differ by less send the traffic to the same places."""


def copy_of(placement: Placement) -> Copy:
    return placement.engine, placement.version


def by_engine(placements: Iterable[Placement]) -> dict[str, set[str]]:
    """Versions by engine."""
    engines: dict[str, set[str]] = {}
    for placement in placements:
        engines.setdefault(placement.engine, set()).add(placement.version)
    return engines


def pinned(load: EngineLoad) -> set[str]:
    """Versions that the engine holds for a plan."""
    return {adapter.version for adapter in load.resident if adapter.pinned}


def with_shares(placements: Iterable[Placement]) -> tuple[Placement, ...]:
    """The shares of an adapter's copies sum to 1 again, in the proportion in which they stand."""
    copies = list(placements)
    totals: dict[str, float] = {}
    for copy in copies:
        totals[copy.version] = totals.get(copy.version, 0.0) + copy.share
    return tuple(
        copy if abs(totals[copy.version] - 1) < 1e-9 else msgspec.structs.replace(copy, share=share)
        for copy in copies
        for share in [copy.share / totals[copy.version]]
    )


def shares_moved(before: Iterable[Placement], after: Iterable[Placement]) -> bool:
    """Whether a copy in both takes another share of its adapter's traffic."""
    shares = {copy_of(p): p.share for p in before}
    return any(abs(shares.get(copy_of(p), p.share) - p.share) > SHARE_NOISE for p in after)


def prepared(
    target: Iterable[Placement],
    absent: Mapping[Copy, str],
    before: Iterable[Placement],
    engines: Collection[str],
    answered: Collection[str],
    drained: frozenset[str],
) -> tuple[Placement, ...]:
    """The target without the copies that are ``absent``; each of those keeps one of the plan before in its place.

    Make before break: a move whose target failed is not made, or an adapter could be left without any copy. Kept is
    what lies on ``engines``, drained ones last. Where an adapter would be planned nowhere, copies stay planned that
    were lost with an engine (one that has not ``answered``): it is asked for them as soon as it is back.
    """
    ready = [p for p in target if copy_of(p) not in absent]
    have = {copy_of(p) for p in ready}
    lost = [version for _, version in absent]
    kept: list[Placement] = []
    for old in sorted(before, key=lambda p: (p.engine in drained, p.engine, p.version)):
        spare = copy_of(old) not in have and copy_of(old) not in absent and old.engine in engines
        if spare and old.version in lost:
            lost.remove(old.version)
            kept.append(old)
    somewhere = {p.version for p in (*ready, *kept)}
    gone = [old for old in before if old.version not in somewhere and old.engine not in answered]
    kept += [old for old in gone if old.version in lost]
    return with_shares(sorted([*ready, *kept], key=lambda p: (p.name, p.version, p.engine)))


def recovered(engines: Iterable[EngineLoad], adapters: Mapping[str, AdapterRef]) -> tuple[Placement, ...]:
    """A plan that was lost, as the engines still hold it: all copies of an adapter take the same share."""
    held = [(adapters[v], load.engine) for load in engines for v in sorted(pinned(load)) if v in adapters]
    return with_shares(Placement(version=a.version, name=a.name, engine=engine, share=1.0) for a, engine in held)
