"""Figures of the engine bench: gaps between tokens, steps, results of servers."""

import pytest
from harness.cases import Case, adapter_of, all_cases, prompt
from harness.http_bench import HttpComparison, workloads
from harness.http_load import LoadResult, Stream
from harness.loading_gap import Gaps, _gaps, _longest
from harness.steps import StepComparison


def test_cases_hold_no_more_adapters_than_sequences() -> None:
    cases = all_cases()
    assert Case(16, 16) in cases
    assert Case(4, 16) not in cases
    assert [adapter_of(Case(4, 2), index) for index in range(4)] == ["r8-0", "r16-1", "r8-0", "r16-1"]
    assert adapter_of(Case(4, 0), 3) == ""


def test_prompts_differ_from_their_first_token() -> None:
    firsts = {prompt(sequence, 5, 49152, seed)[0] for sequence in range(16) for seed in range(8)}
    assert len(firsts) > 100
    assert all(0 <= token < 320 for token in prompt(15, 64, 320, 99))


def test_ratios_take_the_best_round_of_each_side() -> None:
    steps = StepComparison()
    steps.ours = {Case(16, 0): [0.060, 0.040], Case(16, 16): [0.050, 0.090], Case(16, 4): [0.05]}
    steps.theirs = {Case(16, 4): [0.4, 0.3]}
    assert steps.ratio(Case(16, 4)) == 6.0
    assert steps.ratio(Case(16, 0)) is None
    assert steps.lora_share() == 0.2
    assert steps.figures()["b16_0adapters_tok_s"] == 400.0
    assert steps.figures()["transformers_b16_4adapters_tok_s"] == pytest.approx(16 / 0.3)


def test_servers_that_did_not_run_are_null() -> None:
    http = HttpComparison(workloads("a", "b"), 3)
    http.results["ours"] = {work.name: LoadResult(100.0, 0.2, 50.0) for work in http.loads}
    figures = http.figures(["ours", "peer"])
    assert figures["ours_3way_x4_tok_s"] == 100.0
    assert figures["ours_decode_x1_tok_s"] == 50.0
    assert figures["ours_base_x1_ttft_ms"] == 200.0
    assert figures["peer_3way_x4_tok_s"] is None
    assert http.ratio("ours", "peer", "3way_x4") is None


def test_the_three_way_workload_has_four_streams() -> None:
    three = next(work for work in workloads("a", "b") if work.name == "3way_x4")
    assert three.adapters == ("", "a", "b", "")


def test_a_gap_counts_for_the_event_that_it_meets() -> None:
    streams = [Stream(4, 0.0, [1.0, 1.1, 1.5, 1.6]), Stream(4, 0.0, [1.0, 1.2, 1.3, 1.6])]
    gaps = _gaps(streams, 0.5, 1.6)
    assert _longest(gaps, (1.15, 1.2)) == pytest.approx(0.4)
    assert _longest(gaps, (1.55, 1.58)) == pytest.approx(0.3)
    assert Gaps(0.1, 0.1, [0.2, 0.25], [0.1]).longest_steps() == 2.5
