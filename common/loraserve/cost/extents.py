"""Sizes of extents, the contiguous memory blocks of an adapter pool. Each is a multiple of a granule."""

MIN_EXTENT_BYTES = 4096
"""The default granule. Every extent begins and ends at a multiple of it."""


def extent_bytes(slab_bytes: int, granule_bytes: int = MIN_EXTENT_BYTES) -> int:
    return max(1, -(-slab_bytes // granule_bytes)) * granule_bytes


def largest_extent_bytes(pool_bytes: int, granule_bytes: int = MIN_EXTENT_BYTES) -> int:
    """Return the bytes of the largest extent in an empty adapter pool: all whole granules in ``pool_bytes``."""
    return pool_bytes // granule_bytes * granule_bytes
