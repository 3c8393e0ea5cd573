"""Configuration: sources and their order, refused values, and the round trip through TOML."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.config import (
    MAX_SLAB_READ_BYTES,
    BusConfig,
    ClusterConfig,
    Config,
    EngineConfig,
    GatewayConfig,
    StoreConfig,
    engine_names,
    load_config,
    to_toml,
)
from loraserve.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "cluster.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_sources_all_values_are_defaults() -> None:
    assert load_config(environ={}) == Config()


def test_later_sources_win_key_by_key(tmp_path: Path) -> None:
    path = write(tmp_path, "[engine]\nthreads = 2\nmax_rank = 64\nmax_running = 8\n")
    environ = {"LORASERVE_ENGINE__MAX_RANK": "128", "LORASERVE_ENGINE__MAX_RUNNING": "9", "HOME": "/"}
    config = load_config(path, environ, ["engine.max_running=10"])
    assert (config.engine.threads, config.engine.max_rank, config.engine.max_running) == (2, 128, 10)
    assert config.engine.max_adapters == EngineConfig().max_adapters


def test_text_from_environment_and_flags_becomes_the_field_s_type() -> None:
    environ = {
        "LORASERVE_ENGINE__PREFIX_CACHE": "false",
        "LORASERVE_ROUTER__SLO_TTFT_S": "2.5",
        "LORASERVE_STORE__ADAPTERS": '{"a/b:c": "/x y"}',
        "LORASERVE_PORT": "not ours, it names no section",
    }
    config = load_config(environ=environ, overrides=['gateway.api_keys=["k=1", "k2"]', "model.name=a=b"])
    assert config.engine.prefix_cache is False
    assert config.router.slo_ttft_s == 2.5
    assert config.store.adapters == {"a/b:c": "/x y"}
    assert config.gateway.api_keys == ("k=1", "k2")
    assert config.model.name == "a=b"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[engine]\npool = 1\n", ["unknown field `pool`", "$.engine"]),
        ("[motor]\npool_bytes = 1\n", ["unknown field `motor`"]),
        ("pool_bytes = 1\n", ["unknown field `pool_bytes`"]),
        ('[engine]\nthreads = "two"\n', ["`int`", "$.engine.threads"]),
        ('[engine]\nweights = "int3"\n', ["'int3'", "$.engine.weights"]),
        ("[engine]\nmax_rank = 0\n", [">= 1", "$.engine.max_rank"]),
        ("[gateway]\nport = 70000\n", ["<= 65535", "$.gateway.port"]),
        ("[router]\nslo_ttft_s = -1.0\n", ["> 0", "$.router.slo_ttft_s"]),
        ("[router]\nslo_ttft_s = inf\n", ["<= 1", "$.router.slo_ttft_s"]),
        ("[router]\nslo_ttft_s = nan\n", ["$.router.slo_ttft_s"]),
        ("engine = 3\n", ["Expected `object`", "$.engine"]),
        ("[store]\nadapters = ['a']\n", ["$.store.adapters"]),
        ("[engine\n", ["cluster.toml"]),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(write(tmp_path, text), {})
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml.*No such file"):
        load_config(tmp_path / "missing.toml", {})
    (tmp_path / "latin.toml").write_bytes(b'[model]\nname = "\xe9"\n')
    with pytest.raises(ConfigError, match=r"latin\.toml"):
        load_config(tmp_path / "latin.toml", {})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine.threads"], "write section.key=value"),
        (["threads=2"], "write section.key"),
        (["engine.speed=2"], "unknown field `speed`"),
        (["gateway.api_keys=[1"], "--set gateway.api_keys"),
        (["engine.threads=many"], r"--set engine\.threads=many: .*\$\.engine\.threads"),
        (["engine.threads="], r"--set engine\.threads=: Expected `int`, got `str`"),
        (["engine.threads=2", "engine.threads="], r"--set engine\.threads=: "),
        (["engine.prefix_cache="], r"--set engine\.prefix_cache=: Expected `bool`"),
        (["engine.device="], r"--set engine\.device=: Invalid enum value ''"),
        (["gateway.api_keys="], r"--set gateway\.api_keys=: Expected `array`"),
        (['gateway.api_keys=["k", 3]'], r"--set gateway\.api_keys=.*api_keys\[1\]"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(environ={}, overrides=overrides)


def test_a_text_may_be_set_to_the_empty_string() -> None:
    environ = {"LORASERVE_CLUSTER__PROFILE": "", "LORASERVE_MODEL__NAME": "mine"}
    config = load_config(environ=environ, overrides=["model.name="])
    assert (config.cluster.profile, config.model.name) == ("", "")


def test_a_value_of_the_environment_that_cannot_be_used_is_named() -> None:
    with pytest.raises(ConfigError, match="environment LORASERVE_ENGINE__THREADS: Expected `int`"):
        load_config(environ={"LORASERVE_ENGINE__THREADS": ""})


def test_errors_of_the_file_do_not_name_a_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="configuration: Expected `int`"):
        load_config(write(tmp_path, '[engine]\nthreads = "two"\n'), {}, ["engine.device=cpu"])


def test_a_flag_for_a_section_given_as_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine is a section"):
        load_config(write(tmp_path, "engine = 3\n"), {}, ["engine.threads=2"])


def test_an_unknown_key_in_the_environment_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown field `turbo`"):
        load_config(environ={"LORASERVE_ENGINE__TURBO": "1"})


def test_engines_are_named_from_zero() -> None:
    assert engine_names(Config(cluster=ClusterConfig(engines=3))) == ("engine-0", "engine-1", "engine-2")


def test_the_shipped_cluster_file_holds_to_the_schema() -> None:
    shipped = Path(__file__).parents[3] / "compose" / "loraserve.toml"
    assert load_config(shipped, {}).cluster.engines >= 1


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)
configs = st.builds(
    Config,
    bus=st.builds(BusConfig, connect=texts, bind=texts, peers=st.dictionaries(texts, texts, max_size=3)),
    cluster=st.builds(ClusterConfig, engines=st.integers(1, 2**62), run_dir=texts, log_level=st.just("debug")),
    engine=st.builds(EngineConfig, prefix_cache=st.booleans(), load_timeout_s=st.floats(1e-300, 1e9)),
    store=st.builds(
        StoreConfig,
        adapters=st.dictionaries(texts, texts, max_size=3),
        allowed_dirs=st.lists(texts, max_size=3).map(tuple),
    ),
    gateway=st.builds(GatewayConfig, api_keys=st.lists(texts, max_size=3).map(tuple)),
)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_a_written_configuration_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = tmp_path_factory.mktemp("toml") / "c.toml"
    path.write_bytes(to_toml(config).encode())
    assert load_config(path, {}) == config


def test_a_size_may_be_a_number_or_auto() -> None:
    sizes = [
        load_config(environ={}, overrides=[f"engine.host_cache_bytes={text}"]).engine.host_cache_bytes
        for text in ("auto", "0", "4096")
    ]
    assert sizes == ["auto", 0, 4096]
    with pytest.raises(ConfigError, match=r"engine\.host_cache_bytes"):
        load_config(environ={}, overrides=["engine.host_cache_bytes=-1"])


def test_every_default_is_within_its_own_bounds() -> None:
    values: dict[str, Any] = msgspec.to_builtins(Config())
    assert msgspec.convert(values, Config) == Config()


def test_a_chunk_that_the_store_would_refuse_is_refused_with_its_field_and_the_remedy() -> None:
    most = f"engine.load_chunk_bytes={MAX_SLAB_READ_BYTES}"
    assert load_config(overrides=[most]).engine.load_chunk_bytes == MAX_SLAB_READ_BYTES
    with pytest.raises(
        ConfigError, match=r"engine\.load_chunk_bytes is 16777217, .* at most 16777216 bytes.*; lower it"
    ):
        load_config(overrides=[f"engine.load_chunk_bytes={MAX_SLAB_READ_BYTES + 1}"])
