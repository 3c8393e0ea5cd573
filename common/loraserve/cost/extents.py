"""Sizes of extents, the memory blocks of an adapter pool. Each size is a multiple of the pool's granule."""

MIN_EXTENT_BYTES = 4096
"""The default granule. Every extent begins and ends at a multiple of it."""


def extent_bytes(slab_bytes: int, granule_bytes: int = MIN_EXTENT_BYTES) -> int:
    return max(1, -(-slab_bytes // granule_bytes)) * granule_bytes


def largest_extent_bytes(pool_bytes: int, granule_bytes: int = MIN_EXTENT_BYTES) -> int:
    """Return the bytes of the largest extent in an empty adapter pool: the whole granules in ``pool_bytes``."""
    return pool_bytes // granule_bytes * granule_bytes
