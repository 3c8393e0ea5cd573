"""Requests count less the older they are, and a bounded number of versions is remembered."""

import pytest

from loraserve.engine.host_cache.cache import UseCounts


def test_a_request_counts_half_after_each_half_life() -> None:
    uses = UseCounts(half_life_s=10.0)
    uses.add("a", 0.0)
    assert [uses.get("a", now) for now in (0.0, 10.0, 20.0)] == [1.0, 0.5, 0.25]
    uses.add("a", 20.0)
    assert uses.get("a", 30.0) == pytest.approx(0.625)
    assert uses.get("never asked for", 0.0) == 0.0


def test_only_requests_change_the_order_of_two_adapters() -> None:
    uses = UseCounts(half_life_s=10.0)
    for version, times in (("a", 3), ("b", 2)):
        for _ in range(times):
            uses.add(version, 0.0)
    assert all(uses.get("a", now) > uses.get("b", now) for now in (0.0, 1.0, 50.0, 5000.0))
    uses.add("b", 50.0)
    assert uses.get("b", 50.0) > uses.get("a", 50.0)


def test_counts_decay_to_zero() -> None:
    uses = UseCounts(half_life_s=10.0)
    uses.add("a", 0.0)
    assert uses.get("a", 1e9) == 0.0


def test_the_rarest_versions_are_forgotten_when_there_are_too_many() -> None:
    uses = UseCounts(half_life_s=10.0, most=4)
    for version in "aab":
        uses.add(version, 0.0)
    for index in range(1000):
        uses.add(f"once-{index}", 1.0)
        assert len(uses) <= 4
    assert uses.get("a", 1.0) > 1.5, "who is asked for often outlives any number of others"
