"""The inputs of scripts/bench policies: lengths, prompts, placements and settings."""

import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live.policies import CONTIGUOUS, LIVE_POLICIES, OURS, RANDOM, pins
from live.scene import ADAPTERS, LONGEST_TOKENS, make_workload, prompt_of, shortened
from policies import first_seconds

from loraserve.config import load_config
from loraserve.errors import ConfigError
from loraserve.sim.policies import POLICY_NAMES, policy_named
from loraserve.sim.workload import SimRequest, Workload, make_adapters

SLAB_BYTES_PER_RANK = 90_000


def test_lengths_fit_the_engines() -> None:
    workload = make_workload(3000, SLAB_BYTES_PER_RANK)
    assert len(workload.adapters) == ADAPTERS
    assert {adapter.rank for adapter in workload.adapters} == {8, 16, 32, 64, 128}
    # The mean is a little lower because the longest requests are shortened.
    assert 120 < statistics.fmean(r.prompt_tokens for r in workload.requests) <= 165
    assert 12 < statistics.fmean(r.output_tokens for r in workload.requests) <= 17
    assert max(r.prompt_tokens + r.output_tokens for r in workload.requests) <= LONGEST_TOKENS


requests = st.lists(
    st.builds(SimRequest, st.floats(0, 100), st.integers(0, 1), st.integers(1, 100_000), st.integers(1, 100_000)),
    min_size=1,
    max_size=30,
)


@given(requests, st.integers(1, 500), st.integers(1, 100))
def test_shortened_requests_stay_requests(drawn: list[SimRequest], prompt: int, output: int) -> None:
    workload = Workload("test", make_adapters((8, 8), 1), tuple(drawn))
    short = shortened(workload, prompt, output, LONGEST_TOKENS)
    assert [(r.time_s, r.adapter) for r in short.requests] == [(r.time_s, r.adapter) for r in drawn]
    for request in short.requests:
        assert request.prompt_tokens >= 1
        assert request.output_tokens >= 2
        assert request.prompt_tokens + request.output_tokens <= LONGEST_TOKENS


def test_prompts_differ_at_the_beginning_and_have_valid_tokens() -> None:
    prompts = [tuple(prompt_of(number, 20, 94)) for number in range(2000)]
    assert len({prompt[:3] for prompt in prompts}) == 2000
    assert all(len(prompt) == 20 and min(prompt) >= 0 and max(prompt) < 94 for prompt in prompts)
    assert len(prompt_of(5, 2, 94)) == 2


@pytest.mark.parametrize("policy", [RANDOM, CONTIGUOUS])
def test_pins_assign_each_adapter_to_one_engine_evenly(policy) -> None:
    workload = make_workload(100, SLAB_BYTES_PER_RANK)
    pinned = pins(policy.place, workload, 4)
    assert pinned == pins(policy_named(policy.name).place, workload, 4)
    assert set(pinned) == {adapter.name for adapter in workload.adapters}
    engines = [engine for engines in pinned.values() for engine in engines]
    assert len(engines) == len(pinned)
    assert {engine: engines.count(engine) for engine in engines} == {f"engine-{i}": ADAPTERS // 4 for i in range(4)}


@pytest.mark.parametrize("policy", LIVE_POLICIES, ids=lambda policy: policy.name)
def test_the_settings_of_a_policy_are_settings_of_the_cluster(policy) -> None:
    workload = make_workload(100, SLAB_BYTES_PER_RANK)
    config = load_config(environ={}, overrides=policy.settings(workload, 4))
    assert (config.planner.policy, config.router.policy) == (policy.planner, policy.router)
    assert len(config.planner.pins) == (ADAPTERS if policy.place else 0)
    assert (config.router.policy == "predicted") == (policy == OURS)
    assert policy.name in POLICY_NAMES


def test_a_trace_is_replayed_with_its_clients_as_tenants(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"{second},client-{second % 3},{1000 + second},{50 + second}" for second in range(60)]
    trace.write_text("\n".join(["time_s,client,prompt_tokens,output_tokens", *rows]))
    workload = make_workload(50, SLAB_BYTES_PER_RANK, str(trace))
    assert len(workload.requests) == 50
    assert len(workload.adapters) == ADAPTERS
    with pytest.raises(ConfigError, match="no-such-file"):
        make_workload(50, SLAB_BYTES_PER_RANK, "no-such-file.csv")


def test_only_requests_of_the_first_seconds_are_sent() -> None:
    workload = make_workload(200, SLAB_BYTES_PER_RANK).at(10.0)
    begun = first_seconds(workload, 5.0)
    assert 25 < len(begun.requests) < 80
    assert begun.requests == workload.requests[: len(begun.requests)]
    assert begun.requests[-1].time_s <= 5.0 < workload.requests[len(begun.requests)].time_s
