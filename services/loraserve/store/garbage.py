"""Which slabs may go. Pure: the caller lists the files and removes them."""

from collections.abc import Collection, Mapping


def removable(last_used: Mapping[str, float], referenced: Collection[str], now: float, grace_s: float) -> list[str]:
    """Versions of slabs that no name refers to and that nobody has stored or opened for ``grace_s``.

    The grace covers engines that are still fetching a version whose name has just gone, and a registration whose slab
    is on disk while its name is not yet in the registry. ``last_used`` is in unix seconds, like ``now``.
    """
    return sorted(v for v, used in last_used.items() if v not in referenced and now - used > grace_s)
