"""The forecast bench: splitting, demand series, errors and output."""

import json
from collections import Counter
from pathlib import Path
from random import Random

import forecast
import pytest
from peers.forecasters import FORECASTERS, BackToMean, LastInterval, MedianOfIntervals

from loraserve.sim.traces import TraceRequest

STEPS = 6


def steady(seconds: int, *clients: str) -> list[TraceRequest]:
    """Every client asks for 100 tokens every second."""
    return [TraceRequest(float(second), client, 60, 40) for second in range(seconds + 1) for client in clients]


def test_a_split_loses_no_request_and_follows_a_power_law() -> None:
    requests = steady(3000, "a", "b")
    parts = forecast.split(requests, 8, Random(0))
    assert [(r.time_s, r.client.partition("/")[0]) for r in parts] == [(r.time_s, r.client) for r in requests]
    counts = Counter(request.client for request in parts)
    assert counts.keys() == {f"{client}/{rank}" for client in "ab" for rank in range(4)}
    assert counts["a/0"] / counts["a/3"] == pytest.approx(4, rel=0.25)


def test_fewer_adapters_than_clients_is_one_each() -> None:
    assert {r.client for r in forecast.split(steady(10, "a", "b", "c"), 1, Random(0))} == {"a/0", "b/0", "c/0"}


def test_demand_is_the_tokens_of_each_step() -> None:
    requests = [TraceRequest(7.0, "a", 5, 5), TraceRequest(11.9, "b", 10, 10), TraceRequest(12.0, "a", 20, 20)]
    assert forecast.demand_series([*requests, TraceRequest(17.0, "a", 1, 1)], 5.0) == [[2.0, 8.0], [4.0, 0.0]]


def test_errors_are_relative_to_the_demand_and_coverage_counts_one_std() -> None:
    score = forecast.Score()
    score.add(90.0, 5.0, 100.0)
    score.add(110.0, 0.0, 100.0)
    assert (score.relative_error, score.coverage) == (0.1, 0.5)


def test_every_forecaster_is_exact_for_constant_demand() -> None:
    scores = forecast.score([[50.0] * 60], 5.0, STEPS)
    assert scores.keys() == FORECASTERS.keys()
    for score in scores.values():
        assert score.forecasts == 60 // STEPS - forecast.FIRST_COUNTED
        assert score.relative_error == pytest.approx(0.0, abs=1e-9)
        assert score.coverage == 1.0


def test_the_forecast_is_zero_before_the_first_request() -> None:
    (last,) = [forecast.score([[0.0] * 4 * STEPS + [10.0] * STEPS], 5.0, STEPS)["last interval"]]
    assert last.relative_error == 1.0


@pytest.mark.parametrize(
    ("forecaster", "expected"),
    [(LastInterval(2), 35.0), (MedianOfIntervals(2), 25.0), (BackToMean(5.0, kept=0.0), 25.0)],
)
def test_the_simple_forecasters_do_what_their_names_say(forecaster: LastInterval, expected: float) -> None:
    for first, second in ((10.0, 20.0), (20.0, 30.0), (30.0, 40.0)):
        forecaster.observe(first)
        forecaster.observe(second)
        forecaster.learn((first + second) / 2)
    assert forecaster.forecast() == pytest.approx(expected)


def test_the_bench_ends_with_a_line_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "t.csv"
    rows = "".join(f"{r.time_s},{r.client},{r.prompt_tokens},{r.output_tokens}\n" for r in steady(1200, "a", "b"))
    trace.write_text("time_s,client,prompt_tokens,output_tokens\n" + rows)
    assert forecast.main([str(trace), "--quick", "--adapters", "4"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["bench"] == "forecast"
    assert line["figures"]["error_clients_30s"] == 0.0
    assert line["figures"]["error_split_30s"] > 0


def test_a_trace_that_cannot_be_used_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "short.csv"
    trace.write_text("time_s,client,prompt_tokens,output_tokens\n0,a,1,1\n60,a,1,1\n")
    assert forecast.main([str(trace)]) == 1
    assert f"{trace}: time_s covers 60 s" in capsys.readouterr().err
    assert forecast.main([str(tmp_path / "none.csv")]) == 1
    assert "none.csv: cannot be read" in capsys.readouterr().err
