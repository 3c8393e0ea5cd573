"""What is announced of a read: its progress to the runner, its number and estimate to the scheduler."""

from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from loraserve.adapter.format import SlabHeader, make_layout
from loraserve.engine.loading import arrival
from loraserve.engine.loading.arrival import AnnouncedLoad, Arrival, ReadAnnouncer
from loraserve.engine.loading.speeds import FROM_STORE, LinkSpeeds
from loraserve.engine.schedule.events import AdapterArriving, LoadAdapter
from loraserve.engine.schedule.report import SpeedMeter
from loraserve.messages import AdapterRef
from loraserve.model_shape import MODULES, SLICES, ModelShape

SHAPE = ModelShape(layers=2, hidden=16, heads=2, kv_heads=1, head_dim=8, ffn=24, vocab=64)
OFFSET_BYTES = 4096


@pytest.fixture
def header() -> SlabHeader:
    rows = [(2,) * len(SLICES[module]) for _ in range(SHAPE.layers) for module in MODULES]
    return make_layout(SHAPE, "float32", rows, [(1.0,) * len(row) for row in rows])


@pytest.fixture
def load(header: SlabHeader) -> LoadAdapter:
    return LoadAdapter(AdapterRef(name="a", version="v", rank=2, slab_bytes=header.slab_bytes), 3, OFFSET_BYTES)


@pytest.fixture
def watched(load: LoadAdapter, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return one load; ``tokens`` is the estimate, ``refuses`` whether the runner refuses the slab."""
    made = SimpleNamespace(arrived=[], told=[], tokens=5, refuses=False)

    def arrive(slot: int, header: SlabHeader, base_elements: int, arrival: Arrival) -> None:
        if made.refuses:
            raise ValueError("slab is of another dtype")
        made.arrived.append((slot, base_elements, arrival))

    monkeypatch.setattr(arrival, "min_prefill_tokens", lambda left_s, measured: made.tokens)
    made.runner = SimpleNamespace(arrive=arrive)
    made.watch = AnnouncedLoad(load, made.runner, SpeedMeter(), LinkSpeeds(), made.told.append, count(1))
    return made


def there(arrival: Arrival, layer: int) -> bool:
    return arrival.wait_for(layer, 0.0)


def test_the_runner_learns_of_each_layer_and_the_scheduler_of_the_read(watched: Any, header: SlabHeader) -> None:
    watched.watch.begin(header, FROM_STORE, 0.0)
    ((slot, base_elements, arrival),) = watched.arrived
    assert (slot, base_elements) == (3, OFFSET_BYTES // 4)
    watched.watch.arrived(header.layer(0).stop)
    assert (there(arrival, 0), there(arrival, 1)) == (True, False)
    assert watched.told == [AdapterArriving("v", 1, 5)]
    assert watched.watch.read_number == 1


def test_the_scheduler_is_told_whenever_the_estimate_changes(watched: Any, header: SlabHeader) -> None:
    watched.watch.begin(header, FROM_STORE, 0.0)
    for watched.tokens in (None, 5, 5, 6, None, 4):
        watched.watch.arrived(16)
    assert [told.least_tokens for told in watched.told] == [5, 6, None, 4]


def test_an_abandoned_read_has_no_number_and_the_next_has_another(watched: Any, header: SlabHeader) -> None:
    watched.watch.begin(header, FROM_STORE, 0.0)
    watched.watch.arrived(header.slab_bytes)
    watched.watch.abandon()
    assert watched.watch.read_number == 0, "what comes another way is not what anybody began with"
    watched.watch.arrived(header.slab_bytes)
    watched.watch.begin(header, FROM_STORE, 0.0)
    assert watched.watch.read_number == 2
    (_, _, broken), (_, _, second) = watched.arrived
    assert not there(broken, 0)
    assert not there(second, 0), "nothing of it is there yet"
    watched.watch.arrived(16)
    assert [(told.read, told.least_tokens) for told in watched.told] == [(1, 5), (2, 5)]


def test_a_slab_that_the_runner_cannot_use_is_not_announced(watched: Any, header: SlabHeader) -> None:
    watched.refuses = True
    watched.watch.begin(header, FROM_STORE, 0.0)
    watched.watch.arrived(header.slab_bytes)
    watched.watch.abandon()
    assert (watched.watch.read_number, watched.told) == (0, [])


def test_a_runner_without_layers_gets_no_announcements(load: LoadAdapter) -> None:
    runner: Any = SimpleNamespace(steps_ahead=0)
    assert ReadAnnouncer(runner, SpeedMeter(), LinkSpeeds(), lambda event: None).follow(load) is None
