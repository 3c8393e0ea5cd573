"""The policies bench: limiting engines to a share of a core, profiling them, and the prediction."""

import json
import os
import subprocess
import sys
import time
from math import nan
from pathlib import Path

import msgspec
import pytest
from harness.report import BenchError
from hypothesis import given
from hypothesis import strategies as st
from live.cluster import LiveResult, cluster_settings, misplaced, read_logs
from live.cpu_share import Meter, held_to, share_of_core, used_s, waited_s
from live.policies import CONTIGUOUS, OURS, RANDOM
from live.prediction import Predicted, predict
from live.profiling import fitted
from live.replay import Replayed, Served
from live.scene import ENGINE_SETTINGS, ENGINES, Scene, make_workload
from policies import Bench, main
from workers.limit_cpu import LARGEST_CREDIT_S, Budget
from workers.profiled_engine import Engine

from loraserve.config import load_config
from loraserve.cost import CostModel, StepShape, extent_bytes
from loraserve.cost.derived import ITEM_BYTES, rank_elements
from loraserve.model_shape import ModelShape
from loraserve.planner.placement.problem import POOL_FRACTION
from loraserve.sim.workload import RANKS
from loraserve.testing.tiny_model import write_tiny_model

SHAPE = ModelShape(layers=8, hidden=384, heads=12, kv_heads=4, head_dim=32, ffn=1024, vocab=94)
COST = CostModel(
    step_base_s=0.002,
    sequence_s=0.0003,
    kv_token_s=1e-6,
    prefill_token_s=0.0003,
    prefill_kv_token_s=3e-7,
    slab_byte_s=5e-11,
    rank_token_s=1.5e-6,
    padded_prefill_s=0.0,
    padded_decode_s=0.0,
    load_base_s=0.0002,
    load_byte_s=1e-9,
)
LIMITS = {
    "kv_blocks": 1000,
    "block_tokens": 16,
    "pool_bytes": 64 << 20,
    "max_running": 16,
    "max_step_tokens": 256,
    "max_model_tokens": 1024,
}


@given(st.floats(0.05, 1.0), st.lists(st.tuples(st.floats(0.001, 0.05), st.floats(0.0, 1.0)), min_size=1, max_size=100))
def test_a_process_that_stops_on_request_stays_within_its_share(share: float, ticks: list[tuple[float, float]]) -> None:
    """A process may exceed its share until the next check; the excess is deducted afterwards."""
    budget = Budget(share, 0.0, 0.0)
    now_s = used_cpu_s = 0.0
    longest_s = max(length_s for length_s, _ in ticks)
    runs = False
    for length_s, busy in ticks:
        now_s += length_s
        used_cpu_s += length_s * busy if runs else 0.0
        runs = budget.may_run(now_s, used_cpu_s)
        assert used_cpu_s <= share * now_s + longest_s + 1e-9


def test_an_idle_process_accumulates_little_credit() -> None:
    budget = Budget(0.5, 0.0, 0.0)
    assert budget.may_run(100.0, 0.0)
    assert not budget.may_run(100.001, LARGEST_CREDIT_S + 0.001)


def test_limited_processes_continue_afterwards() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with held_to(0.05, [busy.pid]):
            deadline_s = time.monotonic() + 30
            while state(busy.pid) != "T" and time.monotonic() < deadline_s:
                time.sleep(0.001)
            assert state(busy.pid) == "T"
        assert state(busy.pid) != "T"
    finally:
        busy.kill()
        busy.wait()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_meter_is_none_if_its_counter_is_not_available() -> None:
    counter = iter((5.0, 5.0 + 1e-9, None))
    meter = Meter(lambda: next(counter))
    assert (meter.rate() or 0.0) > 0
    assert meter.rate() is None
    assert used_s([os.getpid()]) > 0
    assert waited_s([]) is None
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert Meter(lambda: used_s([gone.pid])).rate() is None


def test_an_engine_gets_at_most_one_core() -> None:
    assert 0 < share_of_core(4) <= 1
    assert share_of_core(1000) * 1000 == pytest.approx(share_of_core(500) * 500)


def test_reasons_and_plans_are_read_off_the_logs(tmp_path: Path) -> None:
    routed = ['{"why": "spill", "event": "routed"}', '{"why": "planned", "event": "routed"}', 'torn "routed" line']
    (tmp_path / "router.log").write_text("\n".join([*routed, routed[0], '{"event": "rejected"}']))
    (tmp_path / "planner.log").write_text('{"event": "plan_published"}\n{"event": "plan_read"}\n')
    assert read_logs(tmp_path) == ({"planned": 1, "spill": 2}, 1)


def test_settings_of_the_cluster_are_settings() -> None:
    config = load_config(environ={}, overrides=[*ENGINE_SETTINGS, *cluster_settings(1.5, Path("profile.json"))])
    assert (config.router.slo_ttft_s, config.cluster.profile) == (1.5, "profile.json")
    assert load_config(environ={}, overrides=cluster_settings(1.5, None)).cluster.profile == ""


def test_misplaced_pinned_copies_are_found() -> None:
    placements = [{"name": "a", "engine": "engine-0"}, {"name": "b", "engine": "engine-1"}]
    assert misplaced(placements, {"a", "b"}, {}) == {}
    assert misplaced(placements, {"a", "b"}, {"a": ["engine-0"], "b": ["engine-1"]}) == {}
    assert misplaced(placements, {"a", "b", "c"}, {"a": ["engine-3"]}) == {"a": ["engine-0"], "c": []}


def test_any_adapters_assigned_to_an_engine_fit_into_its_plan() -> None:
    extents = sorted(extent_bytes(adapter.slab_bytes) for adapter in scene().workload.adapters)
    pool_bytes = load_config(environ={}, overrides=ENGINE_SETTINGS).engine.pool_bytes
    assert sum(extents[-len(extents) // ENGINES :]) <= POOL_FRACTION * pool_bytes < sum(extents)


def scene() -> Scene:
    workload = make_workload(400, rank_elements(SHAPE) * ITEM_BYTES)
    return Scene(Path("model"), SHAPE, {}, workload)


def answers() -> list[dict[str, object]]:
    """Return the answers of engines whose steps take exactly the CPU time of COST."""
    shapes = [
        StepShape(
            decode_sequences=number % 5,
            kv_tokens=number % 5 * 100 * (1 + number % 3),
            prefill_tokens=number * 7 % 200,
            prefill_kv_tokens=(number * 7 % 200) * (50 + number),
            slab_bytes=number % 4 * 1_000_000,
            rank_tokens=number * 37 % 500 * (number % 4),
        )
        for number in range(1, 81)
    ]
    rows = [(msgspec.structs.asdict(shape), COST.step_s(shape)) for shape in shapes]
    loads = [(rank * 89_000, COST.load_s(rank * 89_000)) for rank in (8, 16, 32, 64, 128)]
    return [{"steps": rows[i::ENGINES], "loads": loads, "alone_s": 0.05} for i in range(ENGINES)]


def test_a_profile_is_cpu_time_over_the_share_of_a_core() -> None:
    profile, alone_s = fitted(scene(), LIMITS, answers())
    share = share_of_core(ENGINES)
    assert alone_s == pytest.approx(0.05 / share)
    assert profile.cost.prefill_token_s == pytest.approx(COST.prefill_token_s / share, rel=1e-3)
    assert profile.cost.rank_token_s == pytest.approx(COST.rank_token_s / share, rel=1e-3)
    assert profile.cost.load_byte_s == pytest.approx(COST.load_byte_s / share, rel=1e-3)
    assert profile.residuals is not None
    assert profile.residuals.median < 1e-3
    assert profile.engine.slab_bytes_per_rank == 89_000


def test_a_profiled_engine_returns_samples_for_the_fit(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "llama")
    settings = ["engine.threads=1", f"engine.kv_bytes={4 << 20}", f"engine.pool_bytes={8 << 20}"]
    engine = Engine(tmp_path / "model", RANKS, settings)
    questions = [{"batches": 30, "rounds": 1, "seed": seed, "prompt_tokens": 20} for seed in range(2)]
    timed = [json.loads(json.dumps(engine.answer(question))) for question in questions]
    assert timed[0]["steps"] != timed[1]["steps"]
    limits = json.loads(json.dumps(engine.hello()))["limits"]
    profile, alone_s = fitted(scene(), limits, timed)
    assert alone_s > 0
    assert profile.engine.kv_blocks == engine.limits.kv_blocks
    assert profile.cost.step_s(StepShape(prefill_tokens=200)) > profile.cost.step_s(StepShape(prefill_tokens=1))


def test_what_cannot_be_fitted_is_an_error() -> None:
    broken = answers()
    broken[0]["steps"] = [(shape, nan) for shape, _ in broken[0]["steps"]]  # type: ignore[attr-defined]
    with pytest.raises(BenchError, match="cannot be fitted"):
        fitted(scene(), LIMITS, broken)


def bench(load: float = 0.7) -> Bench:
    return Bench(scene(), fitted(scene(), LIMITS, answers()), load, 5.0, 20.0)


def live(ttft_s: float) -> LiveResult:
    served = [Served(due_s=float(i), sent_s=float(i), first_s=i + ttft_s, end_s=i + 2 * ttft_s) for i in range(21)]
    return LiveResult(Replayed(served), 0.1, {"planned": 21}, 1, 1.0, 0.1, None, None)


def test_the_simulator_sees_that_a_slower_engine_starts_later() -> None:
    made = bench()
    profile = made.profiled.profile
    cost = {name: 2 * value for name, value in msgspec.structs.asdict(profile.cost).items() if name != "lora"}
    slower = msgspec.structs.replace(profile, cost=CostModel(lora=profile.cost.lora, **cost))
    fast, slow = (predict(made.workload, OURS.name, p, made.slo_s) for p in (profile, slower))
    assert fast.p95_s is not None
    assert slow.p95_s is not None
    assert fast.p95_s < slow.p95_s
    assert fast.busy < slow.busy <= 1
    assert fast.goodput_rps >= slow.goodput_rps


def test_more_load_is_more_requests_a_second() -> None:
    assert bench(0.8).workload.rps > 1.5 * bench(0.4).workload.rps
    assert bench().slo_s == pytest.approx(5 * 0.05 / share_of_core(ENGINES))


def test_what_was_not_measured_is_null() -> None:
    made = bench()
    assert set(made.ratios().values()) == {None}
    made.live = {OURS.name: live(0.2), RANDOM.name: live(0.4)}
    made.predicted = {OURS.name: Predicted(0.1, 0.3, 1.0, 0.5)}
    ratios = made.ratios()
    assert ratios["p95_vs_random"] == pytest.approx(0.5)
    assert ratios["p95_vs_contiguous"] is None
    assert ratios["goodput_vs_random"] == pytest.approx(1.0)
    assert ratios["predicted_vs_measured_p95"] == pytest.approx(1.5)
    figures = made.figures()
    assert figures["ours_p95_s"] == pytest.approx(0.2)
    assert figures["ours_other_cores"] is None
    assert figures[f"{CONTIGUOUS.name.replace('-', '_')}_p95_s"] is None
    assert set(bench().figures()) == set(figures)
    assert "0.20 (0.30)" in made.tables()


def test_a_missing_trace_ends_the_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trace", "no-such-file.csv"]) == 1
    assert "no-such-file.csv" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--load", "0"], ["--slo", "-1"], ["--requests", "3"], ["--load", "nan"]])
def test_invalid_numbers_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert arguments[0] in capsys.readouterr().err
