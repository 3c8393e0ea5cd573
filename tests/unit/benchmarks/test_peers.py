"""Peers' kernels behind our adaptors, against our definition. Skipped where their files are not installed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from loraserve.model_shape import ModelShape

pytest.importorskip("triton", reason="the GPU kernels need triton")

from loraserve.benchmarks.lora.cases import LoraCase
from loraserve.benchmarks.lora.peers import SGLANG, VLLM, missing, root_of
from loraserve.benchmarks.lora.peers.csgmv import Csgmv
from loraserve.benchmarks.lora.peers.sglang_v2 import SglangV2, first_match, read_plans
from loraserve.benchmarks.lora.peers.vllm import COMMON, SHRINK, Vllm, load_vllm
from loraserve.benchmarks.lora.self_check import use_few_blocks
from loraserve.benchmarks.lora.sides import Side, World, largest_error

ROOT = Path(__file__).resolve().parents[3]
PEERS = ROOT / ".peers"
TINY = ModelShape(layers=1, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=50)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY = range(4)
MIXED = LoraCase(name="mixed", slots=(0, 1, 2, 0, 3, 3, 2, 1, 0, 2), ranks=(8, 16, 32, 8))
UNEVEN = LoraCase(name="one adapter of four in use, and many tokens", slots=(2,) * 40, ranks=(8, 16, 32, 8))
ERROR = 1e-3
"""Half precision rounds the result once or twice."""

needs_vllm = pytest.mark.skipif(bool(missing(PEERS, VLLM)), reason=f"no kernels of vLLM in {PEERS}")
needs_sglang = pytest.mark.skipif(bool(missing(PEERS, SGLANG)), reason=f"no kernels of SGLang in {PEERS}")


def off(make: Any, case: LoraCase, modules: range = range(2), **chosen: Any) -> float:
    """Return the largest error, by default over modules with three slices of different width and with one."""
    world = World(TINY, case.ranks, DEVICE, torch.float16)
    side: Side = use_few_blocks(make(PEERS, world, case, 32))
    for setting in side.setting:
        setting.update(chosen)
    return largest_error(side, world, case, modules)


@needs_vllm
def test_vllm_computes_the_definition() -> None:
    assert off(Vllm, MIXED, EVERY) < ERROR
    assert off(Vllm, UNEVEN) < ERROR
    assert off(Vllm, MIXED, shrink={**SHRINK[-2], **COMMON}) < ERROR


@needs_vllm
def test_vllm_knows_new_weights_at_old_addresses() -> None:
    """Its cache of pointers must not outlive the weights of an earlier server."""
    world = World(TINY, MIXED.ranks, DEVICE, torch.float16)
    pointers = load_vllm(root_of(PEERS, VLLM))[3]
    for max_rank in (32, 64):
        side = use_few_blocks(Vllm(PEERS, world, MIXED, max_rank))
        assert not pointers._LORA_A_PTR_DICT
        assert not pointers._LORA_B_PTR_DICT
        assert largest_error(side, world, MIXED, range(1)) < ERROR
        assert pointers._LORA_A_PTR_DICT, "there is something to forget"


@needs_sglang
def test_sglang_v2_computes_the_definition() -> None:
    assert off(SglangV2, MIXED, EVERY) < ERROR
    assert off(SglangV2, UNEVEN) < ERROR
    assert off(SglangV2, MIXED, a={"SPLIT_K": 2, "BLOCK_SIZE_K": 32}, b={"BLOCK_SIZE_N": 32}, block=32) < ERROR
    assert off(SglangV2, MIXED, a={"SPLIT_K": 2, "BLOCK_SIZE_K": 32, "SPLIT_MODE": "planes"}) < ERROR


@needs_sglang
@pytest.mark.parametrize("families", [("per_row", "per_row"), ("all_slots", "per_row"), ("grouped", "per_row")])
def test_sglang_v2_in_every_family_of_kernels(families: tuple[str, str]) -> None:
    world = World(TINY, MIXED.ranks, DEVICE, torch.float16)
    side = SglangV2(PEERS, world, MIXED, 32)
    side._plans = [{**plan, "a_family": families[0], "b_family": families[1]} for plan in side._plans]
    assert largest_error(side, world, MIXED, range(2)) < ERROR


@needs_sglang
def test_sglang_v2_routes_large_batches_by_its_other_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraserve.benchmarks.lora.peers.sglang_v2.SMALL_ROUTE_PAIRS", 8)
    assert off(SglangV2, MIXED) < ERROR


@needs_sglang
def test_sglang_csgmv_computes_the_definition() -> None:
    assert off(Csgmv, MIXED, EVERY) < ERROR
    assert off(Csgmv, UNEVEN, chunk=32) < ERROR
    assert off(Csgmv, MIXED, range(1), split=2, expand={"BLOCK_N": 32, "BLOCK_K": 16}) < ERROR


@needs_sglang
def test_sglangs_own_plan_tables_have_a_plan_for_every_module() -> None:
    rows = read_plans(root_of(PEERS, SGLANG))
    for phase, tokens in (("decode", 64), ("prefill", 4096)):
        for k, n in ((4096, 6144), (4096, 28672), (14336, 4096)):
            plan = first_match(rows, phase, {"tokens": tokens, "rank": 128, "in_features": k, "out_features": n})
            assert {"a_family", "b_family", "block_size", "a_tiles", "b_tiles"} <= set(plan)


def test_the_first_row_that_allows_the_sizes_is_the_plan() -> None:
    rows: list[dict[str, Any]] = [
        {"name": "other", "kinds": ["embedding"], "spec": {"n": 0}},
        {"name": "small", "phase": "decode", "max_tokens": 8, "spec": {"n": 1}},
        {"name": "wide", "phase": "decode", "min_in_features": 8192, "max_rank": None, "spec": {"n": 2}},
        {"name": "any", "spec": {"n": 3}},
    ]
    assert first_match(rows, "decode", {"tokens": 8, "rank": 8, "in_features": 64}) == {"n": 1}
    assert first_match(rows, "decode", {"tokens": 9, "rank": 8, "in_features": 8192}) == {"n": 2}
    assert first_match(rows, "prefill", {"tokens": 8, "rank": 8, "in_features": 64}) == {"n": 3}
    with pytest.raises(ValueError, match="no plan for prefill"):
        first_match(rows[:3], "prefill", {"tokens": 8})


def test_what_is_missing_is_named_with_the_way_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="scripts/bench lora --install-peers"):
        root_of(tmp_path, VLLM)
