"""Sizes of extents in an adapter pool, which are multiples of a granule."""

MIN_EXTENT_BYTES = 4096
"""The granule: every extent begins and ends at a multiple of it."""


def extent_bytes(slab_bytes: int, granule_bytes: int = MIN_EXTENT_BYTES) -> int:
    return max(1, -(-slab_bytes // granule_bytes)) * granule_bytes


def largest_extent_bytes(pool_bytes: int, granule_bytes: int = MIN_EXTENT_BYTES) -> int:
    """Return the size of the largest extent that a pool of this size can ever provide; 0 if it is too small."""
    return pool_bytes // granule_bytes * granule_bytes
