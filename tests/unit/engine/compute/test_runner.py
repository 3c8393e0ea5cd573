"""The CPU runner on tiny models: slots, refusals, warm-up, and the engine's setup."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from loraserve.adapter.pack import Slab
from loraserve.config import ClusterConfig, Config, EngineConfig, ModelConfig
from loraserve.engine import setup
from loraserve.engine.compute.runner import CpuRunner
from loraserve.engine.setup import (
    build_runner,
    digest_threads_for,
    host_cache_bytes,
    scheduler_limits,
    threads_for,
)
from loraserve.errors import ConfigError

MakeRunner = Callable[..., CpuRunner]
PROMPT = [5, 6, 7, 8]


def quiet(text: str) -> None:
    pass


@pytest.fixture
def slab(strong_slab: Callable[[str], Slab]) -> Slab:
    return strong_slab("llama")


def tokens(helpers: SimpleNamespace, runner: CpuRunner, slot: int = -1) -> list[int]:
    stream = helpers.Stream("r", PROMPT, blocks=range(8), slot=slot)
    helpers.drive(runner, [stream], 8, [16])
    return stream.output


def test_a_slab_is_used_from_install_to_remove(make_runner: MakeRunner, slab: Slab, helpers: SimpleNamespace) -> None:
    runner = make_runner()
    base = tokens(helpers, runner)
    assert tokens(helpers, runner, slot=2) == base, "a slot without an adapter is the base model"
    last = runner.pool_elements - slab.header.elements
    runner.pool.write(last * 4, slab.data)
    runner.install(2, slab.header, last)
    assert tokens(helpers, runner, slot=2) != base
    assert tokens(helpers, runner) == base
    runner.remove(2)
    assert tokens(helpers, runner, slot=2) == base


def test_a_slab_of_another_dtype_is_refused(make_runner: MakeRunner, slab: Slab) -> None:
    runner = make_runner(slab_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"slab is float32, engine\.slab_dtype is bfloat16; register"):
        runner.install(0, slab.header, 0)


@pytest.mark.parametrize("past_the_end", [-(1 << 40), 1])
def test_a_slab_must_lie_in_the_pool(
    make_runner: MakeRunner, slab: Slab, helpers: SimpleNamespace, past_the_end: int
) -> None:
    runner = make_runner()
    base = tokens(helpers, runner)
    with pytest.raises(ValueError, match=f"slab of {slab.header.elements} elements at -?[0-9]+ is outside"):
        runner.install(0, slab.header, runner.pool_elements - slab.header.elements + past_the_end)
    assert tokens(helpers, runner, slot=0) == base, "the slot must not change"


def test_a_slab_for_another_model_is_refused(make_runner: MakeRunner, slab: Slab) -> None:
    other = msgspec.structs.replace(slab.header, shape=msgspec.structs.replace(slab.header.shape, vocab=1))
    with pytest.raises(ValueError, match="register the adapter again"):
        make_runner().install(0, other, 0)


def test_the_pool_has_the_configured_size(make_runner: MakeRunner) -> None:
    runner = make_runner(pool_bytes=10_001, slab_dtype="bfloat16")
    assert (runner.pool_elements, len(runner.pool)) == (5000, 10_000)
    runner.pool.write(0, b"\1" * 10_000)


def test_too_little_kv_memory_is_refused_with_the_least_setting(make_runner: MakeRunner) -> None:
    with pytest.raises(ConfigError, match=r"engine\.kv_bytes=1000 holds not one block of 16 tokens") as refused:
        make_runner(kv_bytes=1000)
    enough = int(str(refused.value).split("give at least ")[1].split(",")[0])
    assert make_runner(kv_bytes=enough).kv_blocks == 1
    with pytest.raises(ConfigError):
        make_runner(kv_bytes=enough - 1)


@pytest.mark.parametrize(
    ("setting", "value", "text"),
    [
        ("block_tokens", 24, r"engine\.block_tokens is 24, it must be a multiple of 16"),
        ("pool_bytes", 1, r"engine\.pool_bytes=1 holds no adapter"),
    ],
)
def test_unusable_settings_are_named_in_the_error(make_runner: MakeRunner, setting: str, value: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make_runner(**{setting: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_refused_with_a_remedy() -> None:
    config = Config(model=ModelConfig(path="anywhere"), engine=EngineConfig(device="cuda"))
    with pytest.raises(ConfigError, match=r"=cuda: torch .*; (install|look at).*, or set engine\.device=cpu"):
        build_runner(config, quiet)


def test_auto_selects_the_cpu_if_the_gpu_is_unusable(
    model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "resolve_device", lambda setting: "cuda")
    monkeypatch.setattr(setup, "gpu_error", lambda: "torch is a CPU build; install torch for CUDA")
    said: list[str] = []
    runner = build_runner(Config(model=ModelConfig(path=str(model_dirs["llama"]))), said.append)
    assert isinstance(runner, CpuRunner)
    assert "computing on the CPU: torch is a CPU build; install torch for CUDA" in said


@pytest.mark.parametrize("slab_dtype", ["float32", "bfloat16", "float16"])
def test_warm_up_does_not_change_outputs(make_runner: MakeRunner, helpers: SimpleNamespace, slab_dtype: str) -> None:
    runner = make_runner(slab_dtype=slab_dtype)
    before = tokens(helpers, runner)
    runner.warm_up()
    assert tokens(helpers, runner) == before


def test_warm_up_needs_only_one_block(make_runner: MakeRunner) -> None:
    block_bytes = (4 << 20) // make_runner(kv_bytes=4 << 20).kv_blocks
    runner = make_runner(kv_bytes=block_bytes)
    assert runner.kv_blocks == 1
    runner.warm_up()


def test_a_step_uses_the_configured_number_of_threads(make_runner: MakeRunner, helpers: SimpleNamespace) -> None:
    runner = make_runner(threads=1)
    torch.set_num_threads(2)
    tokens(helpers, runner)
    assert torch.get_num_threads() == 1


def test_an_empty_model_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.path is empty; name a Hugging Face model directory"):
        build_runner(Config(), quiet)


def test_the_engines_of_a_machine_share_its_cores() -> None:
    engines = msgspec.structs.replace(Config().cluster, engines=10_000)
    assert threads_for(Config(cluster=engines)) == 1
    assert threads_for(Config(engine=EngineConfig(threads=3), cluster=engines)) == 3


@pytest.mark.parametrize(
    ("cores", "engines", "on_device", "settings", "threads"),
    [
        (256, 8, True, {}, 8),
        (28, 2, True, {}, 7),
        (1, 1, True, {}, 1),
        (64, 2, False, {}, 1),
        (64, 2, False, {"threads": 28}, 4),
        (64, 2, False, {"threads": 4}, 8),
        (2, 2, False, {"threads": 8}, 1),
        (2, 2, False, {"digest_threads": 5}, 5),
        (256, 8, True, {"digest_threads": 16}, 16),
    ],
)
def test_digest_threads_use_the_cores_that_steps_leave_free(
    cores: int, engines: int, on_device: bool, settings: dict[str, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "core_count", lambda: cores)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    config = Config(cluster=ClusterConfig(engines=engines), engine=EngineConfig(**settings))
    assert digest_threads_for(config, on_device) == threads


GIB = 1 << 30


@pytest.mark.parametrize(
    ("wanted", "engines", "on_device", "memory", "expected"),
    [
        ("auto", 1, False, 64 * GIB, 0),
        ("auto", 1, True, 64 * GIB, 8 * GIB),
        ("auto", 4, True, 64 * GIB, 4 * GIB),
        (0, 1, True, 64 * GIB, 0),
        (GIB, 2, False, 2 * GIB, GIB),
    ],
)
def test_the_host_cache_size_follows_the_setting_or_the_machines_memory(
    wanted: Any, engines: int, on_device: bool, memory: int, expected: int
) -> None:
    config = Config(cluster=ClusterConfig(engines=engines), engine=EngineConfig(host_cache_bytes=wanted))
    assert host_cache_bytes(config, on_device, memory) == expected


def test_host_caches_larger_than_the_memory_are_refused() -> None:
    config = Config(cluster=ClusterConfig(engines=2), engine=EngineConfig(host_cache_bytes=GIB))
    with pytest.raises(ConfigError, match=r"host_cache_bytes is 1073741824 for each of 2 engines.*lower it"):
        host_cache_bytes(config, False, 2 * GIB - 1)


def test_contradicting_limits_are_refused(make_runner: MakeRunner) -> None:
    config = Config(engine=EngineConfig(max_step_tokens=4, max_running=8))
    with pytest.raises(ConfigError, match=r"engine\.max_step_tokens is 4.*engine\.max_running"):
        scheduler_limits(config, make_runner())


def test_contradicting_settings_are_refused_before_the_model_is_loaded() -> None:
    config = Config(model=ModelConfig(path="anywhere"), engine=EngineConfig(max_step_tokens=4, max_running=8))
    with pytest.raises(ConfigError, match=r"engine\.max_step_tokens is 4"):
        build_runner(config, quiet)


@pytest.mark.parametrize(("asked", "given"), [(0, 512), (100, 100), (100_000, 512)])
def test_the_context_is_at_most_the_models(make_runner: MakeRunner, asked: int, given: int) -> None:
    config = Config(model=ModelConfig(max_model_tokens=asked))
    assert scheduler_limits(config, make_runner()).max_model_tokens == given
