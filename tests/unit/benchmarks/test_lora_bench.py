"""The LoRA benchmark without a GPU: cases, floors, keys, and the way from a step to its line with a fake timer."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from loraserve.benchmarks.lora import cases, report
from loraserve.benchmarks.lora import command as bench_lora
from loraserve.benchmarks.lora.cases import (
    LLAMA_3_8B,
    MIXED_64,
    OURS,
    PEERS,
    SGLANG_V2,
    VLLM_8,
    VLLM_128,
    VLLM_256,
    LoraCase,
    floor_ms,
    layer_bytes,
    makers,
    module_bytes,
    program,
)
from loraserve.benchmarks.lora.report import aligned, last_line
from loraserve.kernels.lora import NO_ADAPTER, plan_batch, reference
from loraserve.model_shape import MODULES, ModelShape

pytest.importorskip("triton", reason="the GPU kernels need triton")

from loraserve.benchmarks.lora.measure import Measurer, WorldSettings
from loraserve.benchmarks.lora.sides import TOLERANCE, Operands, Ours, World, largest_error

KEYS = [
    "vs_floor_64x64", "vs_floor_64x8", "vs_floor_prefill", "vs_vllm_128", "vs_vllm_256", "vs_sglang_v2",
    "rank8_penalty", "decode_with_64_adapters",
]  # fmt: skip
TINY = ModelShape(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=50)
ON_CPU = WorldSettings(device="cpu", shape=TINY, layers=2, dtype=torch.float16)
SMALL = LoraCase(name="small", slots=(0, 1, 0, 2), ranks=(8, 16, 4))


class FakeTimer:
    """Runs a step once and returns the time that ``ms`` gives."""

    def __init__(self, ms: Callable[[], float] = lambda: 1.0) -> None:
        self._ms = ms

    def ms(self, step: Callable[[], None]) -> float:
        step()
        return self._ms()


class Defined:
    """The definition as a side, without kernels and knobs."""

    name = "defined"

    def __init__(self, world: World, case: LoraCase) -> None:
        self._world = world
        self._batch = plan_batch(torch.tensor(case.slots, dtype=torch.int32))
        self.knobs: dict[str, list[Any]] = {}
        self.setting: list[dict[str, Any]] = [{} for _ in MODULES]

    def add(self, y: torch.Tensor, x: torch.Tensor, layer: int, module: int) -> None:
        exact = y.float()
        reference.add_lora(exact, x.float(), self._world.pool, self._world.tables, self._batch, layer, module)
        y.copy_(exact)


class Knobbed(Defined):
    """A side with a knob that can make it fail or give wrong results."""

    name = "knobbed"

    def __init__(self, world: World, case: LoraCase) -> None:
        super().__init__(world, case)
        self.knobs = {"size": [1, 2, 3, 4]}
        self.setting = [{"size": 1} for _ in MODULES]

    def add(self, y: torch.Tensor, x: torch.Tensor, layer: int, module: int) -> None:
        size = self.setting[module]["size"]
        if size == 3:
            raise RuntimeError("out of resource: shared memory")
        super().add(y, x, layer, module)
        if size == 4:
            y += 1


def measurer(ms: Callable[[], float] = lambda: 1.0, quick: bool = False) -> Measurer:
    return Measurer(FakeTimer(ms), 1e9, quick, ON_CPU)


def test_bytes_of_a_small_step_by_hand() -> None:
    case = LoraCase(name="", slots=(0, 2, NO_ADAPTER, 2), ranks=(8, 32, 16))
    assert case.used_ranks == [8, 16]
    # (8 + 16) * (64 + 64) of A and B; 3 tokens of 64 read, 64 read and written; two bytes each.
    assert module_bytes(TINY, "o", case) == 2 * (24 * 128 + 3 * (64 + 2 * 64))
    # qkv: three slices of A, 64 + 32 + 32 outputs.
    assert module_bytes(TINY, "qkv", case) == 2 * (24 * (3 * 64 + 128) + 3 * (64 + 2 * 128))
    assert layer_bytes(TINY, case) == sum(module_bytes(TINY, module, case) for module in MODULES)


@pytest.mark.parametrize(("case", "us"), [(cases.DECODE_64X64, 121), (cases.DECODE_64X8, 15), (cases.PREFILL, 226)])
def test_floors_at_the_speed_of_an_h200_are_the_known_ones(case: LoraCase, us: int) -> None:
    assert round(1e3 * floor_ms(layer_bytes(LLAMA_3_8B, case), 4.3e12)) == us


def test_the_mix_and_the_cases() -> None:
    assert (len(MIXED_64), sum(MIXED_64), set(MIXED_64)) == (64, 3096, {8, 16, 32, 64, 128})
    assert len(set(cases.DECODE_64X64.slots)) == 64
    assert sum(cases.HALF_LARGE.used_ranks) == 32 * 8 + 32 * 128
    assert cases.PREFILL.slots[:513] == (0,) * 512 + (1,), "an adapter's tokens lie together"
    tokens = [case.tokens for case in cases.sweep()]
    assert (min(tokens), max(tokens)) == (1, 4096)
    assert len({case.name for case in cases.sweep()}) == len(tokens)


@pytest.mark.parametrize("quick", [False, True])
def test_the_program_measures_what_every_ratio_needs(quick: bool) -> None:
    found = {(case.name, side) for case, peers in program(quick) for side in (OURS, *peers)}
    mixed = cases.DECODE_64X64.name
    assert found >= {(mixed, side) for side in (OURS, VLLM_128, VLLM_256, SGLANG_V2)}
    assert found >= {(case.name, OURS) for case in (cases.DECODE_64X8, cases.PREFILL, cases.HALF_LARGE)}
    assert found >= {(cases.ALL_SMALL.name, OURS), (cases.ALL_SMALL.name, VLLM_8), (cases.HALF_LARGE.name, VLLM_128)}
    assert {side for _, side in found} <= set(makers(Path("nowhere"))) == {OURS, *PEERS}


def test_weights_lie_where_the_definition_reads_them() -> None:
    world = World(TINY, SMALL.ranks, "cpu", torch.float16)
    case = LoraCase(name="", slots=(1, 1), ranks=SMALL.ranks)
    operands = Operands(world, case)
    for module in (0, 3):
        widths = world.tables.out_features[module]
        y, x = operands.y[module], operands.x[module].float()
        slices = [
            world.scales[1] * (x @ world.a(1, 1, module, i).float().T) @ world.b(1, 1, module, i).float()
            for i in range(len(widths))
        ]
        expected = y.float() + torch.cat(slices, 1)
        Ours(world, case).add(y, operands.x[module], 1, module)
        assert (y.float() - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_the_check_finds_wrong_results() -> None:
    world = World(TINY, SMALL.ranks, "cpu", torch.float16)
    side = Knobbed(world, SMALL)
    assert largest_error(side, world, SMALL) < 1e-3
    side.setting[3]["size"] = 4
    assert largest_error(side, world, SMALL) > 0.1
    world.pool[0] = float("nan")
    assert largest_error(Defined(world, SMALL), world, SMALL, range(1)) == float("inf")


def test_a_line_is_per_layer_and_a_case_is_measured_once() -> None:
    found = measurer(lambda: 6.0)
    found.measure(OURS, Defined, SMALL)
    line = found.lines["small", OURS]
    assert (line.ms, line.floor_ms) == (3.0, layer_bytes(TINY, SMALL) / 1e6)
    assert 0 < line.error < 1e-3
    found._timer = FakeTimer(lambda: 1.0)
    found.measure(OURS, Defined, SMALL)
    assert found.lines["small", OURS].ms == 3.0


def test_knobs_are_tuned_for_each_module_and_what_does_not_run_is_skipped() -> None:
    made: list[Knobbed] = []

    def make(world: World, case: LoraCase) -> Knobbed:
        made.append(Knobbed(world, case))
        return made[0]

    found = measurer(lambda: 10.0 - sum(setting["size"] == 2 for setting in made[0].setting), quick=True)
    found.measure("peer", make, SMALL)
    assert [setting["size"] for setting in made[0].setting] == [2] * len(MODULES)
    line = found.lines["small", "peer"]
    assert (line.ms, line.untuned_ms) == (3.0, 5.0)


def test_a_setting_that_is_fast_and_wrong_does_not_count() -> None:
    made: list[Knobbed] = []

    def make(world: World, case: LoraCase) -> Knobbed:
        made.append(Knobbed(world, case))
        return made[0]

    found = measurer(lambda: 10.0 - sum(setting["size"] == 4 for setting in made[0].setting))
    found.measure("peer", make, SMALL)
    assert made[0].setting[0]["size"] == 4
    assert (found.lines["small", "peer"].ms, found.lines["small", "peer"].error < 1e-3) == (5.0, True)


def test_a_wrong_or_absent_side_has_no_time_but_a_reason() -> None:
    found = measurer(lambda: 1.0)
    found.measure("wrong", _wrong, SMALL)
    for name in (VLLM_128, SGLANG_V2):
        found.measure(name, makers(Path("nowhere"))[name], SMALL)
    assert not found.lines
    assert found.reasons["small", "wrong"].startswith("WrongResultError: knobbed is off by")
    assert "scripts/bench lora --install-peers" in found.reasons["small", VLLM_128]
    assert "scripts/bench lora --install-peers" in found.reasons["small", SGLANG_V2]


def _wrong(world: World, case: LoraCase) -> Knobbed:
    side = Knobbed(world, case)
    side.setting[0]["size"] = 4
    return side


def test_every_key_is_there_and_null_where_nothing_was_measured() -> None:
    found = measurer()
    assert list(report.ratios(found)) == KEYS
    assert set(report.ratios(found).values()) == {None}


def test_ratios_are_taken_of_the_right_sides() -> None:
    found = measurer(lambda: 2.0)
    small = LoraCase(name=cases.DECODE_64X64.name, slots=SMALL.slots, ranks=SMALL.ranks)
    found.measure(OURS, Defined, small)
    found._timer = FakeTimer(lambda: 5.0)
    found.measure(VLLM_128, Defined, small)
    found.measure(VLLM_256, _wrong, small)
    ratios = report.ratios(found)
    assert ratios["vs_vllm_128"] == 2.5
    assert ratios["vs_floor_64x64"] == pytest.approx(1.0 / (layer_bytes(TINY, small) / 1e6))
    assert (ratios["vs_vllm_256"], ratios["rank8_penalty"]) == (None, None)
    figures = report.figures(found, 1e9, 0.5)
    assert figures["decode_64x64_vllm_128_us"] == 2500.0
    assert str(figures["decode_64x64_vllm_256_not_measured"]).startswith("Wrong")
    assert "vllm_128" in report.lines_table(found)


def test_the_line_is_one_line_of_json() -> None:
    line = last_line("lora", {"a": 1.23456, "b": None}, {"c": "why"})
    content = json.loads(line)
    assert "\n" not in line
    assert list(content) == ["bench", "ratios", "figures", "machine", "commit"]
    assert (content["ratios"], content["figures"]) == ({"a": 1.235, "b": None}, {"c": "why"})
    assert aligned(["a", "b", "c"], [["x", "y", 0.12345], ["x", "y", None]]).splitlines()[1:] == [
        "x  y  0.123",
        "x  y      -",
    ]


def test_the_whole_benchmark_with_a_fake_timer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = LoraCase(name=cases.DECODE_64X64.name, slots=SMALL.slots, ranks=SMALL.ranks)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("loraserve.benchmarks.lora.report.machine", lambda: "a GPU")
    monkeypatch.setattr("loraserve.benchmarks.lora.measure.GraphTimer", FakeTimer)
    monkeypatch.setattr("loraserve.benchmarks.lora.measure.copy_bytes_per_s", lambda timer: 1e9)
    monkeypatch.setattr("loraserve.benchmarks.lora.cases.DECODE_64X64", mixed)
    monkeypatch.setattr("loraserve.benchmarks.lora.cases.program", lambda quick: [(mixed, (VLLM_128, SGLANG_V2))])
    monkeypatch.setattr(
        "loraserve.benchmarks.lora.measure.Measurer",
        lambda timer, speed, quick: Measurer(timer, speed, quick, msgspec.structs.replace(ON_CPU, layers=1)),
    )
    assert bench_lora.main(["--quick", "--peers", str(tmp_path), "--side", SGLANG_V2]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    content = json.loads(last)
    assert list(content["ratios"]) == KEYS
    assert content["ratios"]["vs_floor_64x64"] == pytest.approx(1e6 / layer_bytes(TINY, mixed), rel=1e-3)
    assert content["figures"]["copy_gb_per_s"] == 1.0
    assert "decode_64x64_sglang_v2_not_measured" in content["figures"]
    assert "decode_64x64_vllm_128_not_measured" not in content["figures"], "it was not asked for"
    assert lines[1].startswith(f"{mixed.name}  {OURS}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what is said without a GPU")
def test_without_a_gpu_kernels_are_checked_and_all_ratios_are_null(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loraserve.benchmarks.lora.command", "--quick", "--peers", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert content["ratios"] == dict.fromkeys(KEYS)
    assert 0 < content["figures"]["interpreter_error_ours"] < 1e-3
    assert content["figures"]["interpreter_error_vllm"] is None
    assert "--install-peers" in content["figures"]["vllm_not_checked"]
    assert "no CUDA GPU here: nothing is timed" in done.stderr
