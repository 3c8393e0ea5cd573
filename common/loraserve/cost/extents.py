"""Memory has a price as well: a pool gives out extents in whole granules. Pure."""

MIN_EXTENT_BYTES = 4096
"""A granule: every extent begins and ends at a multiple of it."""


def extent_bytes(slab_bytes: int, granule_bytes: int = MIN_EXTENT_BYTES) -> int:
    """What a slab takes of a pool."""
    return max(1, -(-slab_bytes // granule_bytes)) * granule_bytes


def largest_extent_bytes(pool_bytes: int, granule_bytes: int = MIN_EXTENT_BYTES) -> int:
    """The largest extent that a pool of this size can ever give; 0 where it is too small for any."""
    return pool_bytes // granule_bytes * granule_bytes
