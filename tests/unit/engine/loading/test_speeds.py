"""Predicted read times, before and after reads were measured."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.engine.loading.speeds import EXPECTED, MIB, LinkSpeeds, ReadSource, ReadSpeed

SHM = ReadSource("engine-0", "shm")
OTHER = ReadSource("engine-1", "shm")


def read(speeds: LinkSpeeds, way: ReadSource, length_bytes: int, seconds: float) -> None:
    speeds.begin_read(way)
    speeds.finish_read(way, length_bytes, seconds)


def test_latency_and_bandwidth_are_told_apart() -> None:
    speeds, rng = LinkSpeeds(), Random(1)
    truth = ReadSpeed(0.02, 300 * MIB)
    for _ in range(60):
        size = rng.randint(1, 128) * MIB
        read(speeds, SHM, size, truth.seconds(size) * rng.uniform(0.9, 1.1))
    found = speeds.speed(SHM)
    assert found.latency_s == pytest.approx(truth.latency_s, rel=0.5)
    assert found.bytes_per_s == pytest.approx(truth.bytes_per_s, rel=0.15)


def test_an_unused_source_is_predicted_like_others_of_its_transport() -> None:
    speeds = LinkSpeeds()
    assert speeds.speed(SHM).bytes_per_s == pytest.approx(EXPECTED["shm"].bytes_per_s)
    for _ in range(30):
        read(speeds, SHM, 64 * MIB, 1.0)
    assert speeds.predict(OTHER, 64 * MIB) == pytest.approx(1.0, rel=0.1)
    assert speeds.predict(ReadSource("engine-0", "tcp"), 64 * MIB) < 0.2


def test_the_prediction_follows_a_change() -> None:
    speeds = LinkSpeeds()
    for seconds in [0.1] * 30 + [0.4] * 30:
        read(speeds, SHM, 16 * MIB, seconds)
    assert speeds.predict(SHM, 16 * MIB) == pytest.approx(0.4, rel=0.1)


def test_reads_under_way_share() -> None:
    speeds = LinkSpeeds()
    alone = speeds.predict(SHM, MIB)
    speeds.begin_read(SHM)
    assert speeds.predict(SHM, MIB) == pytest.approx(2 * alone)
    speeds.abandon_read(SHM)
    assert speeds.predict(SHM, MIB) == pytest.approx(alone)


def test_a_failing_source_is_avoided_for_longer_each_time_until_it_works() -> None:
    speeds = LinkSpeeds()
    for now, until in ((0.0, 1.0), (1.0, 3.0), (3.0, 7.0)):
        speeds.begin_read(SHM)
        speeds.fail_read(SHM, now)
        assert speeds.is_avoided(SHM, until - 0.01)
        assert not speeds.is_avoided(SHM, until)
    assert not speeds.is_avoided(OTHER, 3.5)
    speeds.forget_failures("engine-1")
    assert speeds.is_avoided(SHM, 3.5)
    speeds.forget_failures("engine-0")
    assert not speeds.is_avoided(SHM, 3.5)
    speeds.begin_read(SHM)
    speeds.fail_read(SHM, 10.0)
    read(speeds, SHM, MIB, 0.1)
    assert not speeds.is_avoided(SHM, 10.0)


@given(st.lists(st.tuples(st.integers(1, 1 << 32), st.floats(1e-6, 1e3)), max_size=60), st.integers(1, 1 << 34))
def test_any_prediction_is_positive_and_grows_with_the_bytes(reads: list[tuple[int, float]], wanted_bytes: int) -> None:
    speeds = LinkSpeeds()
    for size, seconds in reads:
        read(speeds, SHM, size, seconds)
    speed = speeds.speed(SHM)
    assert speed.latency_s >= 0
    assert speed.bytes_per_s > 0
    assert 0 < speeds.predict(SHM, wanted_bytes) <= speeds.predict(SHM, 2 * wanted_bytes) < float("inf")


def test_noise_does_not_make_a_source_endlessly_fast() -> None:
    rng = Random(3)
    for _ in range(200):
        speeds = LinkSpeeds()
        for _ in range(30):
            size = rng.randint(15, 17) * MIB
            read(speeds, SHM, size, 0.1 * rng.uniform(0.7, 1.4))
        assert 0.02 < speeds.predict(SHM, 16 * MIB) < 0.2
        assert speeds.predict(SHM, 256 * MIB) > 0.2
