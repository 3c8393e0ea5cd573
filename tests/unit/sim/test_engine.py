"""The simulated engine takes the time of the cost model, with and without fast-forward."""

import pytest

from loraserve.cost import StepShape
from loraserve.cost.profile import Profile
from loraserve.engine.schedule.events import CopiesRequested, RequestArrived, SchedulerLimits
from loraserve.messages import AdapterRef, Admit, SamplingParams
from loraserve.sim.engine import EngineListener, SimEngine, Timeline

ADAPTER = AdapterRef(name="a", version="v", rank=64, slab_bytes=64 << 16)


class Seen(EngineListener):
    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self.end: dict[str, float] = {}

    def on_first_token(self, request_id: str, now: float) -> None:
        self.first[request_id] = now

    def on_finished(self, request_id: str, now: float) -> None:
        self.end[request_id] = now


def engine(profile: Profile, timeline: Timeline, seen: Seen) -> SimEngine:
    shape = profile.engine
    limits = SchedulerLimits(
        kv_blocks=shape.kv_blocks,
        block_tokens=shape.block_tokens,
        pool_bytes=shape.pool_bytes,
        max_adapters=8,
        max_running=shape.max_running,
        max_waiting=1000,
        max_step_tokens=shape.max_step_tokens,
        max_model_tokens=shape.max_model_tokens,
        eos_token_ids=frozenset(),
        prefix_cache=False,
    )
    return SimEngine("engine-0", limits, profile.cost, timeline, seen)


def arrival(number: int, prompt: int, output: int, adapter: AdapterRef | None = None) -> RequestArrived:
    sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    prompt_tokens = (number,) * prompt
    return RequestArrived(
        Admit(request_id=f"r{number}", gateway="g", prompt_tokens=prompt_tokens, sampling=sampling, adapter=adapter)
    )


def run(timeline: Timeline) -> None:
    while timeline.run_next():
        pass


def test_a_single_request_takes_its_prefill_and_decode_steps(profile: Profile) -> None:
    timeline, seen, cost = Timeline(), Seen(), profile.cost
    engine(profile, timeline, seen).deliver(arrival(1, prompt=100, output=20), 0.0)
    run(timeline)
    prefill_s = cost.step_s(StepShape(prefill_tokens=100, prefill_kv_tokens=5050))
    steps_s = sum(cost.step_s(StepShape(decode_sequences=1, kv_tokens=100 + i)) for i in range(1, 20))
    assert seen.first["r1"] == pytest.approx(prefill_s)
    assert seen.end["r1"] == pytest.approx(prefill_s + steps_s)


def test_reports_do_not_change_an_engine(profile: Profile) -> None:
    ends = []
    for looks in (0, 200):
        timeline, seen = Timeline(), Seen()
        simulated = engine(profile, timeline, seen)
        for number, time_s in enumerate((0.0, 0.1, 0.35)):
            timeline.schedule(
                time_s, lambda now, n=number, e=simulated: e.deliver(arrival(n, 50, 100 + n, ADAPTER), now)
            )  # type: ignore[misc]
        for look in range(looks):
            timeline.schedule(look * 0.013, lambda now, e=simulated: e.report(now) and None)  # type: ignore[misc]
        run(timeline)
        ends.append(seen.end)
    assert ends[1] == pytest.approx(ends[0])


def test_reports_include_fast_forwarded_progress(profile: Profile) -> None:
    timeline, seen = Timeline(), Seen()
    simulated = engine(profile, timeline, seen)
    simulated.deliver(arrival(1, prompt=100, output=1000), 0.0)
    timeline.run_next()
    load, statistics = simulated.report(1.0)
    step_s = profile.cost.step_s(StepShape(decode_sequences=1, kv_tokens=130))
    assert load.queue.running == 1
    assert load.speed.decode_step_s == pytest.approx(step_s, rel=0.01)
    assert statistics.adapter_tokens[0].decode_tokens == pytest.approx((1.0 - seen.first["r1"]) / step_s, abs=2)


def test_every_sequence_of_a_padded_batch_pays_for_the_largest_rank(profile: Profile) -> None:
    def decode_s(*adapters: AdapterRef | None) -> float:
        timeline, seen = Timeline(), Seen()
        simulated = engine(profile, timeline, seen)
        for number, adapter in enumerate(adapters):
            simulated.deliver(arrival(number, 10, 300, adapter), 0.0)
        run(timeline)
        return seen.end["r0"] - seen.first["r0"]

    small = AdapterRef(name="s", version="s", rank=8, slab_bytes=8 << 16)
    extra_s = decode_s(small, ADAPTER) - decode_s(small, small)
    # Two sequences, 56 more of rank, in each of nearly 299 steps; the large adapter joins a few steps later.
    assert extra_s == pytest.approx(299 * 2 * 56 * profile.cost.padded_decode_s, rel=0.05)


def test_loads_share_one_link(profile: Profile) -> None:
    timeline, seen = Timeline(), Seen()
    simulated = engine(profile, timeline, seen)
    adapters = [AdapterRef(name=f"a{i}", version=f"v{i}", rank=64, slab_bytes=64 << 20) for i in range(2)]
    simulated.deliver(CopiesRequested(1, tuple(adapters)), 0.0)
    loaded = []
    while timeline.run_next():
        loaded.append(timeline.now_s)
    mean = simulated.report(timeline.now_s)[0].speed.load
    assert mean is not None
    assert mean.slab_bytes == 64 << 20
    own_s = (64 << 20) / mean.bytes_per_s
    assert own_s == pytest.approx(profile.cost.load_s(64 << 20)), "the second waited, which is not its own time"
    byte_s, base_s = profile.cost.load_byte_s, profile.cost.load_base_s
    assert loaded == pytest.approx([(64 << 20) * byte_s + base_s, 2 * (64 << 20) * byte_s + base_s])
