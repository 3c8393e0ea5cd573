"""A buddy allocator: extents of power-of-two sizes that merge again with their neighbours. Pure.

Source: Knowlton, "A fast storage allocator", CACM 1965.
"""

MIN_EXTENT_BYTES = 4096


class BuddyAllocator:
    """Gives out extents of a region. The region need not be a power of two: it is cut into arenas that are."""

    def __init__(self, region_bytes: int, min_extent_bytes: int = MIN_EXTENT_BYTES) -> None:
        self._min = min_extent_bytes
        self._arenas = _arenas(region_bytes, min_extent_bytes)
        self._free: dict[int, set[int]] = {}
        self._used: dict[int, int] = {}
        for start, size in self._arenas:
            self._free.setdefault(size, set()).add(start)

    def extent_bytes(self, wanted_bytes: int) -> int:
        """Size of the extent that an allocation of ``wanted_bytes`` takes."""
        size = self._min
        while size < wanted_bytes:
            size *= 2
        return size

    @property
    def largest_bytes(self) -> int:
        """The largest extent that could ever be given out."""
        return max((size for _, size in self._arenas), default=0)

    @property
    def free_bytes(self) -> int:
        return sum(size * len(starts) for size, starts in self._free.items())

    def allocate(self, wanted_bytes: int) -> int | None:
        """Offset of an extent, the lowest of the tightest fit; None where there is none."""
        wanted = self.extent_bytes(wanted_bytes)
        size = min((s for s, starts in self._free.items() if s >= wanted and starts), default=0)
        if size == 0:
            return None
        start = min(self._free[size])
        self._free[size].remove(start)
        while size > wanted:
            size //= 2
            self._free.setdefault(size, set()).add(start + size)
        self._used[start] = size
        return start

    def release(self, start: int) -> None:
        """Give an extent back; free buddies merge."""
        size = self._used.pop(start)
        arena_start, arena_size = self._arena(start)
        while size < arena_size:
            buddy = arena_start + ((start - arena_start) ^ size)
            if buddy not in self._free.get(size, ()):
                break
            self._free[size].remove(buddy)
            start = min(start, buddy)
            size *= 2
        self._free.setdefault(size, set()).add(start)

    def window(self, start: int, wanted_bytes: int) -> tuple[int, int] | None:
        """The aligned window of an allocation's size that holds ``start``, as (first byte, end); None if too big."""
        size = self.extent_bytes(wanted_bytes)
        arena_start, arena_size = self._arena(start)
        if size > arena_size:
            return None
        first = arena_start + (start - arena_start) // size * size
        return first, first + size

    def used_in(self, first: int, end: int) -> list[int]:
        """Starts of the extents in use that overlap a window."""
        return [start for start, size in self._used.items() if start < end and start + size > first]

    def validate(self) -> None:
        """Free and used extents tile every arena without gap or overlap, and no two free buddies are apart."""
        spans = [(start, size) for start, size in self._used.items()]
        spans += [(start, size) for size, starts in self._free.items() for start in starts]
        spans.sort()
        expected = [edge for start, size in self._arenas for edge in (start, start + size)]
        position = 0
        for start, size in spans:
            assert start == position, f"gap or overlap at {position}"
            position = start + size
        assert position == (expected[-1] if expected else 0), "the end of the region is missing"
        for size, starts in self._free.items():
            for start in starts:
                arena_start, arena_size = self._arena(start)
                buddy = arena_start + ((start - arena_start) ^ size)
                assert size == arena_size or buddy not in starts, f"free buddies {start} and {buddy} are not merged"

    def _arena(self, start: int) -> tuple[int, int]:
        return next((s, size) for s, size in self._arenas if s <= start < s + size)


def _arenas(region_bytes: int, min_bytes: int) -> list[tuple[int, int]]:
    arenas = []
    start = 0
    while region_bytes - start >= min_bytes:
        size = min_bytes
        while size * 2 <= region_bytes - start:
            size *= 2
        arenas.append((start, size))
        start += size
    return arenas
