"""Sizes of extents in an adapter pool. All sizes are multiples of a granule."""

MIN_EXTENT_BYTES = 4096
"""The default granule. Every extent begins and ends at a multiple of it."""


def extent_bytes(slab_bytes: int, granule_bytes: int = MIN_EXTENT_BYTES) -> int:
    return max(1, -(-slab_bytes // granule_bytes)) * granule_bytes


def largest_extent_bytes(pool_bytes: int, granule_bytes: int = MIN_EXTENT_BYTES) -> int:
    """Return the size of the largest extent that fits in an empty pool, or 0 if the pool is smaller than a granule."""
    return pool_bytes // granule_bytes * granule_bytes
