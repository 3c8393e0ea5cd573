"""Memory has a price as well: a pool gives out extents of power-of-two sizes. Pure."""

MIN_EXTENT_BYTES = 4096


def extent_bytes(slab_bytes: int) -> int:
    """What a slab takes of a pool."""
    return max(MIN_EXTENT_BYTES, 1 << (slab_bytes - 1).bit_length()) if slab_bytes > 0 else MIN_EXTENT_BYTES


def largest_extent_bytes(pool_bytes: int) -> int:
    """The largest extent that a pool of this size can ever give; 0 where it is too small for any."""
    return 1 << (pool_bytes.bit_length() - 1) if pool_bytes >= MIN_EXTENT_BYTES else 0
