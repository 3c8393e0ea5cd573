"""The rest between loads of a plan while steps run."""

from loraserve.engine.adapters.lifecycle import LifecycleEvent, PoolEntry
from loraserve.engine.adapters.residency import LONGEST_REST_S, REST_FACTOR, LoadPace
from loraserve.messages import AdapterRef

REF = AdapterRef(name="name-a", version="a", rank=1, slab_bytes=64)


def test_while_steps_run_one_load_of_the_plan_runs_and_a_rest_follows() -> None:
    pace = LoadPace()
    assert pace.allows(0.0, stepping=True)
    entry = PoolEntry(REF, 0, 0)
    pace.begin(entry)
    pace.update(0.005)
    assert not pace.allows(0.005, stepping=True)
    assert pace.allows(0.005, stepping=False)
    entry.apply(LifecycleEvent.LOADED)
    pace.update(0.01)
    rests_until_s = 0.01 + REST_FACTOR * 0.01
    assert not pace.allows(rests_until_s - 1e-6, stepping=True)
    assert pace.allows(rests_until_s - 1e-6, stepping=False)
    assert pace.allows(rests_until_s, stepping=True)


def test_the_rest_after_a_long_load_is_bounded() -> None:
    pace = LoadPace()
    entry = PoolEntry(REF, 0, 0)
    pace.begin(entry)
    entry.apply(LifecycleEvent.LOADED)
    pace.update(10.0)
    assert not pace.allows(10.0 + LONGEST_REST_S - 1e-6, stepping=True)
    assert pace.allows(10.0 + LONGEST_REST_S, stepping=True)
