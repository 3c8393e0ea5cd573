"""Profile files: refusals, and the choice of a profile for a configuration."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loraserve.benchmarks.ship_profiles import LLAMA_3_8B
from loraserve.config import ClusterConfig, Config, EngineConfig, ModelConfig
from loraserve.cost import CostModel
from loraserve.cost.profile import (
    SHIPPED,
    Profile,
    check_model,
    find_profile,
    initial_cost_model,
    read_profile,
    write_profile,
)
from loraserve.errors import ConfigError
from loraserve.testing.small_profile import small_profile

H200 = read_profile("llama-3-8b-h200")
RANK_8_BYTES = 8 * H200.engine.slab_bytes_per_rank
"""40 MiB, a multiple of the extent granule."""


def hugging_face_dir(directory: Path, **changes: Any) -> str:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        **changes,
    }
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def config(model: str = "", profile: str = "", device: Any = "cuda") -> Config:
    return Config(
        model=ModelConfig(path=model), cluster=ClusterConfig(profile=profile), engine=EngineConfig(device=device)
    )


def changed(section: str, **values: Any) -> Profile:
    part = msgspec.structs.replace(getattr(H200, section), **values)
    return msgspec.structs.replace(H200, **{section: part})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_profile(H200, tmp_path / "mine.json")
    assert read_profile(str(tmp_path / "mine.json")) == H200


@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        (changed("cost", sequence_s=-1e-9), "cost.sequence_s is -1e-09"),
        (changed("cost", step_base_s=0.0, sequence_s=0.0), "a step takes no time"),
        (changed("engine", kv_blocks=0), "engine.kv_blocks is 0"),
        (changed("engine", pool_bytes=-1), "engine.pool_bytes is -1"),
        (changed("engine", max_step_tokens=100), "engine.max_step_tokens is 100, less than engine.max_running 256"),
        (changed("engine", kv_blocks=127), "engine.kv_blocks is 127, room for 2032 tokens and not for one step"),
        (changed("engine", pool_bytes=0), "engine.pool_bytes is 0, no room for an adapter of rank 8"),
        (changed("engine", pool_bytes=RANK_8_BYTES - 1), "give it more memory; measure one"),
        (changed("shape", layers=0), "shape.layers is 0"),
    ],
)
def test_nonsense_is_refused_naming_file_and_field(tmp_path: Path, profile: Profile, reason: str) -> None:
    path = tmp_path / "odd.json"
    write_profile(profile, path)
    with pytest.raises(ConfigError, match=r"scripts/profile") as error:
        read_profile(str(path))
    assert str(path) in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "profile",
    [
        changed("engine", kv_blocks=128),
        changed("engine", pool_bytes=64 << 20),
        small_profile(),
    ],
    ids=["one step", "one adapter of rank 8", "that of the tests"],
)
def test_memory_for_the_least_there_can_be_is_enough(tmp_path: Path, profile: Profile) -> None:
    path = tmp_path / "tight.json"
    write_profile(profile, path)
    assert read_profile(str(path)) == profile


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.json")))
def test_those_that_are_shipped_can_be_read(name: str) -> None:
    assert read_profile(name).engine.pool_bytes > 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated"),
        (b"[]", "Expected `object`"),
        (b'{"model": "other"}', "missing required field"),
        (msgspec.json.encode(H200).replace(b'"sequence_s"', b'"sequence"'), "unknown field `sequence`"),
        (msgspec.json.encode(H200).replace(b'"lora":"exact"', b'"lora":"other"'), "$.cost.lora"),
        (msgspec.json.encode(H200).replace(b'"date"', b'"when"'), "unknown field `when`"),
        (msgspec.json.encode(H200).replace(b'"load_base_s":0.005', b'"load_base_s":1e999'), "load_base_s"),
    ],
)
def test_invalid_profiles_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_profile(str(path))
    assert str(path) in str(error.value)
    assert reason in str(error.value)


def test_a_missing_one_names_those_that_are_shipped() -> None:
    with pytest.raises(ConfigError, match=r"nothing: there is no such file; shipped ones are .*llama-3-8b-a100"):
        read_profile("nothing")


def test_a_profile_for_another_model_names_both(tmp_path: Path) -> None:
    model = hugging_face_dir(tmp_path / "small", num_hidden_layers=16)
    with pytest.raises(ConfigError) as error:
        find_profile(config(model, "llama-3-8b-h200"))
    message = str(error.value)
    for part in ("llama-3-8b-h200", "another model", "Llama-3-8B with layers 32", "has layers 16", "scripts/profile"):
        assert part in message
    check_model(H200, LLAMA_3_8B)


def test_a_named_profile_is_used(tmp_path: Path) -> None:
    model = hugging_face_dir(tmp_path / "model")
    padded = find_profile(config(model, "llama-3-8b-a100-padded"))
    assert padded is not None
    assert padded.cost.lora == "padded"
    assert find_profile(config("", "llama-3-8b-h200")) == H200, "a router has no model directory"


def test_none_named_takes_the_shipped_one_of_the_model_and_device(tmp_path: Path) -> None:
    model = hugging_face_dir(tmp_path / "model")
    found = find_profile(config(model))
    assert found is not None
    assert (found.shape, found.device, found.cost.lora) == (LLAMA_3_8B, "cuda", "exact")
    assert find_profile(config(model, device="cpu")) is None
    assert find_profile(config(hugging_face_dir(tmp_path / "other", vocab_size=320))) is None
    assert find_profile(config(str(tmp_path / "missing"))) is None
    assert find_profile(config()) is None


def test_the_demo_model_on_a_cpu_has_a_measured_one(tmp_path: Path) -> None:
    demo = hugging_face_dir(
        tmp_path / "demo",
        num_hidden_layers=30,
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
    )
    found = find_profile(config(demo, device="cpu"))
    assert found == read_profile("smollm2-135m-cpu")
    assert found is not None
    assert found.residuals is not None
    assert (found.origin, found.device) == ("measured", "cpu")
    assert found.residuals.median < 0.1
    assert found.residuals.held_out >= 30


def test_pricing_starts_from_the_profile_or_the_defaults(tmp_path: Path) -> None:
    assert initial_cost_model(config("", "llama-3-8b-h200")) == H200.cost
    assert initial_cost_model(config()) == CostModel()
