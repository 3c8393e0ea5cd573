"""scripts/simulate, from its flags to its last line."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loraserve.cost.profile import write_profile
from loraserve.sim.command import main
from loraserve.testing.small_profile import small_profile

SMALL = ("--engines", "2", "--adapters", "10", "--requests", "120", "--workers", "1")
TRACE = "time_s,client,prompt_tokens,output_tokens\n" + "".join(f"{i * 0.1},c{i % 4},{20 + i},8\n" for i in range(200))


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    path = tmp_path / "small.json"
    write_profile(small_profile(), path)
    return ["--profile", str(path), *SMALL]


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return content


def test_one_run_prints_its_figures(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "--rps", "5"]) == 0
    assert last_line(capsys)["figures"]["p95_ttft_s"] > 0


def test_a_sweep_has_a_point_for_each_policy_and_load(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    # 0 workers, the default, means one for each core.
    assert main([*flags, "--policies", "ours,dynamo", "--loads", "2,4", "--workers", "0"]) == 0
    points = last_line(capsys)["points"]
    assert [(p["policy"], p["rps"]) for p in points] == [("ours", 2), ("ours", 4), ("dynamo", 2), ("dynamo", 4)]


def test_a_sweep_plots_each_policy_at_the_highest_load(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def drawn(loads: str) -> dict[str, bytes]:
        out = tmp_path / loads
        assert main([*flags, "--policies", "ours,dynamo", "--loads", loads, "--out", str(out)]) == 0
        return {path.name: path.read_bytes() for path in out.iterdir()}

    both = drawn("4,2")
    assert set(both) == {"timeline_ours.png", "timeline_dynamo.png"}
    assert both == drawn("4")
    assert both != drawn("2")
    said = capsys.readouterr().out
    assert f"wrote {tmp_path / '4,2' / 'timeline_ours.png'}" in said
    assert "intervals" not in json.loads(said.splitlines()[-1])["points"][0]


def test_a_comparison_of_a_trace_prints_its_json_keys_and_plots(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(TRACE)
    out = tmp_path / "plots"
    policies = "toppings,slora-random,ours"
    more = ["--slo-s", "0.2", "--out", str(out), "--json"]
    status = main([*flags, "--compare", "--trace", str(trace), "--policies", policies, *more])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert captured.out.count("\n") == 1, "--json is one line"
    content = json.loads(captured.out)
    assert set(content["policies"]) == {"toppings", "slora-random", "ours"}
    for figures in content["policies"].values():
        assert figures["max_rps"] > 0
        assert set(figures) == {
            "max_rps",
            "max_rps_draws",
            "p95_at_80pct_s",
            "engines_needed",
            "adapter_bytes_share",
            "moves_per_interval",
        }
    draws = content["policies"]["slora-random"]["max_rps_draws"]
    assert (len(draws), draws[1]) == (3, content["policies"]["slora-random"]["max_rps"])
    assert content["policies"]["ours"]["max_rps_draws"] == [content["policies"]["ours"]["max_rps"]]
    drawn = {path.name for path in out.iterdir()}
    assert drawn == {
        "p95_ttft.png",
        "goodput.png",
        "engines_needed.png",
        "adapters_per_engine.png",
        "moves_per_interval.png",
        "timeline.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.iterdir())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--policies", "mine"], "policy 'mine' is not known; there are"),
        (["--profile", "llama-9"], "shipped ones are"),
        (["--cost", "exact"], "has padded LoRA cost, --cost says exact"),
        (["--engines", "0"], "--engines 0"),
        (["--compare", "--draws", "0"], "--draws 0"),
        (["--slo-s", "0"], "--slo-s 0.0"),
        (["--loads", "1,fast"], "--loads 1,fast"),
        (["--ranks", "huge"], "--ranks huge: there are uniform"),
        (["--sensitivity"], "was measured; take a derived one"),
        (["--rps", "nan"], "--rps nan"),
        (["--rps", "inf"], "--rps inf"),
        (["--rps", "1e-9"], "at least 0.01"),
        (["--loads", "nan,5"], "--loads nan,5"),
        (["--workers", "-1"], "--workers -1"),
        (["--requests", "1"], "--requests 1"),
        (["--grid", "--policies", "ours,slora-random"], "add them"),
        (["--out", "/proc/x"], "--out /proc/x"),
        (["--trace", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_a_wrong_flag_is_named_with_the_allowed_values(
    more: list[str], said: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, *more]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("time_s,client,prompt_tokens\n1,a,5\n", "output_tokens"),
        (TRACE + "-4,c1,5,5\n", "line 202"),
        (TRACE + "4,,5,5\n", "client"),
    ],
)
def test_errors_in_a_trace_name_file_and_line_or_field(
    content: str, said: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "bad.csv"
    trace.write_text(content)
    assert main([*flags, "--rps", "5", "--trace", str(trace)]) == 1
    error = capsys.readouterr().err
    assert "bad.csv" in error
    assert said in error


def test_an_invalid_profile_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.json"
    content = msgspec.to_builtins(small_profile())
    del content["cost"]
    path.write_bytes(msgspec.json.encode(content))
    assert main(["--profile", str(path), *SMALL]) == 1
    assert "p.json" in capsys.readouterr().err
