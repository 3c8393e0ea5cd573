"""Which slabs the host cache keeps and drops; slabs that are read or saved always stay."""

from random import Random

import pytest

from loraserve.adapter.format import SlabHeader, make_uniform_layout
from loraserve.engine.host_cache.cache import HostCache
from loraserve.messages import AdapterRef
from loraserve.model_shape import ModelShape

UNIT = 4096
HEADER: SlabHeader = make_uniform_layout(ModelShape(1, 8, 1, 1, 8, 8, 8), "float32", 1)


def adapter(version: str, units: int = 1) -> AdapterRef:
    return AdapterRef(name=f"name-{version}", version=version, rank=8, slab_bytes=UNIT * units - 7)


def offer(cache: HostCache, wanted: AdapterRef, reload_s: float = 1.0, now: float = 0.0, uses: int = 1) -> bool:
    """Count uses of a slab and offer it to the cache; return whether it was saved."""
    for _ in range(uses):
        cache.uses.add(wanted.version, now)
    offset = cache.offer(wanted, HEADER, reload_s, now)
    if offset is not None:
        cache.save_done(wanted.version, now)
    cache.validate()
    return offset is not None


def cache_with(*wanted: AdapterRef, units: int, **offered: float) -> HostCache:
    cache = HostCache(UNIT * units)
    for each in wanted:
        assert offer(cache, each, **offered)  # type: ignore[arg-type]
    return cache


A, B, C, D = (adapter(version) for version in "abcd")


def test_a_slab_without_requests_is_kept_if_there_is_room() -> None:
    cache = HostCache(2 * UNIT)
    assert offer(cache, A, uses=0)
    assert offer(cache, B, uses=0)
    assert (cache.versions, cache.free_bytes) == (("a", "b"), 0)


def test_a_slab_larger_than_the_cache_is_not_kept() -> None:
    cache = cache_with(A, units=2)
    assert not offer(cache, adapter("large", units=3), uses=100)
    assert not offer(HostCache(0), A)
    assert cache.versions == ("a",)


@pytest.mark.parametrize(("reload_s", "uses", "kept"), [(1.0, 1, False), (1.0, 4, True), (4.0, 1, True)])
def test_a_slab_with_more_uses_or_longer_reload_displaces_another(reload_s: float, uses: int, kept: bool) -> None:
    cache = HostCache(UNIT)
    offer(cache, A, uses=2)
    assert offer(cache, B, reload_s, uses=uses) is kept
    assert cache.versions == (("b",) if kept else ("a",))


def test_the_slab_of_least_value_is_dropped() -> None:
    cache = HostCache(3 * UNIT)
    offer(cache, A, reload_s=1.0, uses=3)
    offer(cache, B, reload_s=0.5, uses=4)
    offer(cache, C, reload_s=5.0, uses=1)
    assert offer(cache, D, reload_s=1.0, uses=3)
    assert cache.versions == ("a", "c", "d")


def test_a_slab_that_left_the_pool_has_its_value_again() -> None:
    pool: set[str] = set()
    cache = HostCache(UNIT, pool.__contains__)
    offer(cache, A, uses=3)
    pool.add("a")
    pool.remove("a")
    assert not offer(cache, B)
    assert cache.versions == ("a",)


def test_the_run_with_less_value_per_byte_is_dropped() -> None:
    cache = HostCache(4 * UNIT)
    offer(cache, adapter("large", units=2), uses=3)
    offer(cache, A, uses=2)
    offer(cache, B, uses=2)
    assert offer(cache, adapter("new", units=2), uses=4)
    assert cache.versions == ("a", "b", "new"), "together the small ones are worth more than the large one"


def test_the_value_of_an_unused_slab_decays() -> None:
    cache = HostCache(UNIT)
    offer(cache, A, uses=4, now=0.0)
    assert not offer(cache, B, now=0.0)
    assert offer(cache, B, now=1000.0)


def test_the_oldest_slab_of_equal_value_is_dropped() -> None:
    cache = HostCache(2 * UNIT)
    for now, each in enumerate((A, B, C)):
        assert offer(cache, each, uses=0, now=float(now))
    assert cache.versions == ("b", "c")


def test_a_cached_slab_needs_no_copy_when_it_leaves_the_pool() -> None:
    pool: set[str] = set()
    cache = HostCache(2 * UNIT, pool.__contains__)
    offer(cache, A)
    pool.add("a")
    assert not offer(cache, A)
    assert cache.versions == ("a",)


def test_a_slab_that_is_also_in_the_pool_is_dropped_first() -> None:
    pool: set[str] = set()
    cache = HostCache(2 * UNIT, pool.__contains__)
    offer(cache, A, uses=9)
    offer(cache, B, uses=1)
    pool.add("a")
    assert offer(cache, C, uses=1)
    assert cache.versions == ("b", "c")
    pool.add("b")
    pool.remove("b")
    offer(cache, B, uses=9)
    assert offer(cache, D, uses=1)
    assert cache.versions == ("b", "d"), "b has left the pool: here is the only copy"


def test_a_slab_being_saved_is_not_read_and_stays() -> None:
    cache = HostCache(UNIT)
    assert cache.offer(A, HEADER, 1.0, 0.0) == 0
    assert (cache.versions, cache.begin_read("a")) == ((), None)
    assert cache.offer(B, HEADER, 100.0, 0.0) is None
    cache.save_failed("a", 1.0)
    cache.validate()
    assert cache.offer(B, HEADER, 1.0, 1.0) == 0
    assert "could not be saved" in cache.story.lines("a")[-1]


def test_a_slab_that_is_read_stays() -> None:
    cache = cache_with(A, B, units=2, uses=0)
    slab = cache.begin_read("a")
    assert slab is not None
    cache.lease("b")
    assert not offer(cache, C, uses=9)
    cache.end_read(slab)
    assert offer(cache, C)
    assert cache.versions == ("b", "c")


def test_a_damaged_slab_is_not_read_and_leaves_with_its_last_reader() -> None:
    cache = cache_with(A, units=1)
    slab, leased = cache.begin_read("a"), cache.lease("a")
    assert slab is not None
    cache.damage("a", 1.0)
    assert (cache.versions, cache.begin_read("a"), cache.not_lendable) == ((), None, frozenset("a"))
    cache.end_read(slab)
    assert not offer(cache, A), "a peer reads what lies there still"
    cache.end_lease("a", leased.generation)
    cache.validate()
    assert (cache.get("a"), cache.not_lendable) == (None, frozenset())
    assert offer(cache, A)
    cache.damage("a", 2.0)
    assert cache.get("a") is None, "nobody read it"
    cache.damage("a", 2.0)


def test_the_story_says_where_a_slab_was_saved_and_why_it_was_dropped() -> None:
    cache = HostCache(UNIT)
    offer(cache, A, now=1.0)
    offer(cache, B, now=2.0)
    offer(cache, A, now=3.0, reload_s=0.1)
    assert cache.story.lines("a") == [
        "1.000 saving to the host cache at 0",
        "1.000 saved in the host cache",
        "2.000 dropped from the host cache for name-b",
        "3.000 not cached: what would make room is worth more, or is being read",
    ]


def test_it_saves_more_waiting_than_least_recently_used() -> None:
    """Requests of Zipf popularity for adapters of ranks 8 to 64, behind a pool that holds none of them for long."""
    random = Random(5)
    adapters = [adapter(f"v{index}", units=random.choice((1, 2, 4, 8))) for index in range(60)]
    weights = [1 / (1 + rank) for rank in range(len(adapters))]
    cache, recent = HostCache(60 * UNIT), list[AdapterRef]()
    spared_s = recent_spared_s = 0.0
    for now, wanted in enumerate(random.choices(adapters, weights, k=4000)):
        reload_s = 0.01 + wanted.slab_bytes / (400 * UNIT)
        spared_s += reload_s if wanted.version in cache.versions else 0.0
        recent_spared_s += reload_s if wanted in recent else 0.0
        offer(cache, wanted, reload_s, float(now))
        recent = [wanted, *(other for other in recent if other != wanted)]
        while sum(other.slab_bytes for other in recent) > 60 * UNIT:
            recent.pop()
    assert spared_s > 1.15 * recent_spared_s
