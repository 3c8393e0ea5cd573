"""Refused adapters: each refusal has a code and a message that names the field or tensor."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraserve.adapter.pack import pack_peft
from loraserve.adapter.peft import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE
from loraserve.adapter.tensor_file import TensorFile
from loraserve.adapter.validate import check_name
from loraserve.errors import AdapterError
from loraserve.testing.peft_writer import (
    TINY_SHAPE,
    named_tensors,
    random_pairs,
    safetensors_bytes,
    tensor_name,
    write_peft,
)

Tensors = dict[str, np.ndarray]
A = tensor_name(0, "q_proj", "A")
B = tensor_name(0, "q_proj", "B")


def _tensors() -> Tensors:
    return named_tensors(random_pairs(TINY_SHAPE, {(0, "q_proj"): 8, (1, "down_proj"): 8}))


def _refused(directory: Path, code: str, *mentions: str) -> None:
    with pytest.raises(AdapterError) as caught:
        pack_peft(directory, TINY_SHAPE, "bfloat16", max_rank=16)
    assert caught.value.code == code, caught.value.message
    for mention in mentions:
        assert mention in caught.value.message


@pytest.mark.parametrize(
    ("change", "code", "mentions"),
    [
        ({"peft_type": "IA3"}, "unsupported", ("peft_type", "IA3")),
        ({"use_dora": True}, "unsupported", ("use_dora",)),
        ({"modules_to_save": ["lm_head"]}, "unsupported", ("modules_to_save",)),
        ({"bias": "all"}, "unsupported", ("bias", "'all'")),
        ({"bias": "lora_only"}, "unsupported", ("bias='none'",)),
        ({"lora_bias": True}, "unsupported", ("lora_bias",)),
        ({"use_bdlora": {"nblocks": 2}}, "unsupported", ("use_bdlora",)),
        ({"alora_invocation_tokens": [1]}, "unsupported", ("alora_invocation_tokens",)),
        ({"layer_replication": [[0, 1]]}, "unsupported", ("layer_replication",)),
        ({"init_lora_weights": "pissa_niter_4"}, "unsupported", ("path_initial_model_for_weight_conversion",)),
        ({"init_lora_weights": "olora"}, "unsupported", ("init_lora_weights",)),
        ({"r": 4}, "bad_rank", (A, "says 4", "rank_pattern")),
        ({"rank_pattern": {"q_proj": 9}}, "bad_rank", (A, "says 9")),
        ({"r": "8"}, "bad_format", ("$.r",)),
        ({"r": None}, "bad_format", ("$.r",)),
        ({"lora_alpha": "high"}, "bad_format", ("$.lora_alpha",)),
        ({"lora_alpha": 1e39}, "not_finite", ("lora_alpha",)),
        ({"alpha_pattern": {"q_proj": 1e39}}, "not_finite", ("q_proj",)),
        ({"rank_pattern": [8]}, "bad_format", ("$.rank_pattern",)),
        ({"rank_pattern": {"(": 8}}, "bad_format", ("rank_pattern", "'('")),
        ({"rank_pattern": {"(.+)+!": 8}}, "unsupported", ("rank_pattern", "too complex")),
        ({"alpha_pattern": {".*.*.*.*.*!": 8}}, "unsupported", ("alpha_pattern", "too complex")),
        ({"alpha_pattern": {"(?x: (a+) + )": 8}}, "unsupported", ("alpha_pattern", "too complex")),
        ({"alpha_pattern": {f"m{i}": 8 for i in range(5000)}}, "unsupported", ("alpha_pattern", "5000")),
    ],
)
def test_configuration(tmp_path: Path, change: dict[str, Any], code: str, mentions: tuple[str, ...]) -> None:
    write_peft(tmp_path, _tensors(), **change)
    _refused(tmp_path, code, CONFIG_FILE, *mentions)


def _with(name: str, shape: tuple[int, ...], value: float = 0.0) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: np.full(shape, value, dtype=np.float32)})


def _without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def _poison(name: str, value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[name].__setitem__((1, 1), value)


@pytest.mark.parametrize(
    ("change", "code", "mentions"),
    [
        (_with("base_model.model.model.embed_tokens.lora_embedding_A", (8, 64)), "unsupported", ("embeddings",)),
        (_with("base_model.model.lm_head.lora_A.weight", (8, 16)), "unsupported", ("lm_head",)),
        (_with(A.replace("lora_A.weight", "lora_magnitude_vector"), (16,)), "unsupported", ("DoRA",)),
        (_with(B.replace("weight", "bias"), (16,)), "unsupported", ("is a bias",)),
        (_with(A.replace("q_proj", "rotary"), (8, 16)), "unsupported", ("rotary", "target_modules")),
        (_with(A.replace("self_attn", "mlp"), (8, 16)), "unsupported", ("mlp.q_proj",)),
        (_with(A.replace("layers.0", "layers.00"), (8, 16)), "unsupported", ("layers.00",)),
        (_with(A.replace(".weight", ".default.weight"), (8, 16)), "bad_format", (A, "twice")),
        (_with(tensor_name(2, "q_proj", "A"), (8, 16)), "bad_format", ("layers.2", "lora_B")),
        (_with(A, (8, 17)), "bad_shape", (A, "[8, 17]", "input width 16")),
        (_with(B, (17, 8)), "bad_shape", (B, "[17, 8]", "output width 16")),
        (_with(A, (8, 16, 1)), "bad_shape", (A,)),
        (_with(A, ()), "bad_shape", (A,)),
        (_with(B, (16, 7)), "bad_rank", (A, "rank 8", "7")),
        (_without(A), "bad_format", (B, "lora_A")),
        (_without(B), "bad_format", (A, "lora_B")),
        (_poison(A, np.nan), "not_finite", (A,)),
        (_poison(B, -np.inf), "not_finite", (B,)),
        (lambda tensors: tensors.clear(), "bad_format", (WEIGHTS_FILE, "no tensors")),
    ],
)
def test_tensors(tmp_path: Path, change: Callable[[Tensors], object], code: str, mentions: tuple[str, ...]) -> None:
    tensors = _tensors()
    change(tensors)
    write_peft(tmp_path, tensors)
    _refused(tmp_path, code, *mentions)


@pytest.mark.parametrize("rank", [0, 17])
def test_rank_outside_the_limits(tmp_path: Path, rank: int) -> None:
    write_peft(tmp_path, named_tensors(random_pairs(TINY_SHAPE, {(0, "q_proj"): rank})), r=rank)
    _refused(tmp_path, "bad_rank", f"rank {rank}", "store.max_rank = 16")


def test_layer_out_of_range(tmp_path: Path) -> None:
    extra = {(TINY_SHAPE.layers, "q_proj"): 8}
    write_peft(tmp_path, named_tensors(random_pairs(TINY_SHAPE, extra)))
    _refused(tmp_path, "bad_shape", "layers.2", "layers 0 to 1")


def test_the_directory_itself(tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere", "not_found", "nowhere")
    (tmp_path / "file").write_text("x")
    _refused(tmp_path / "file", "bad_format", "not a directory")
    good = write_peft(tmp_path / "adapter", _tensors())
    (good / CONFIG_FILE).rename(good / "kept")
    _refused(good, "not_found", CONFIG_FILE)
    (good / "kept").rename(good / CONFIG_FILE)
    (good / WEIGHTS_FILE).rename(good / "kept")
    _refused(good, "not_found", WEIGHTS_FILE)
    (good / PICKLE_FILE).write_bytes(b"cos\nsystem\n")
    _refused(good, "unsupported", PICKLE_FILE, "safe_serialization=True")


def test_a_pipe_does_not_make_the_store_wait(tmp_path: Path) -> None:
    write_peft(tmp_path, _tensors())
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        _refused(tmp_path, "bad_format", name, "not a regular file")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"nul", b"\xff\xfe", b"[" * 100_000, b'{"r": ' + b"[" * 100_000])
def test_configuration_that_is_no_json_object(tmp_path: Path, text: bytes) -> None:
    write_peft(tmp_path, _tensors())
    (tmp_path / CONFIG_FILE).write_bytes(text)
    _refused(tmp_path, "bad_format", CONFIG_FILE)


def test_missing_fields_are_named(tmp_path: Path) -> None:
    write_peft(tmp_path, _tensors())
    for field in ("r", "lora_alpha"):
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8}
        del config[field]
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
        _refused(tmp_path, "bad_format", f"`{field}`")


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    write_peft(tmp_path, _tensors())
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
    _refused(tmp_path, "unsupported", "I32", "bfloat16")


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1, -500])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    write_peft(tmp_path, _tensors())
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    _refused(tmp_path, "bad_format", WEIGHTS_FILE, "save_pretrained")


def test_a_file_that_shrinks_while_it_is_read_is_an_error_not_a_crash(tmp_path: Path) -> None:
    write_peft(tmp_path, _tensors())
    path = tmp_path / WEIGHTS_FILE
    with TensorFile(path) as file:
        last = list(file.entries.values())[-1]
        with path.open("r+b") as other:
            other.truncate(last.begin + 5)
        with pytest.raises(AdapterError, match="ends inside"):
            file.read(last)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_files_that_safetensors_refuses_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    """A damaged header raises only AdapterError, and every accepted file is also accepted by safetensors."""
    whole = bytearray(safetensors_bytes({A: np.ones((2, 3), dtype=np.float32), B: np.ones((3, 2), dtype=np.float32)}))
    header_end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header_end - 1))
        whole[at] = data.draw(st.sampled_from(b'{}[]",:0123456789 A\x00\xff') | st.integers(0, 255))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(whole)
    names = _names_or_code(path)
    if names not in ("bad_format", "unsupported"):
        with safetensors.safe_open(path, framework="numpy") as reference:
            assert set(reference.keys()) == names


def _names_or_code(path: Path) -> set[str] | str:
    try:
        with TensorFile(path) as file:
            for entry in file.entries.values():
                file.read(entry)
            return set(file.entries)
    except AdapterError as error:
        return error.code


@pytest.mark.parametrize(
    "name", ["", " a", "a\n", "tab\there", "nul\0", "x" * 201, "base", "\ud800", "zero\u200bwidth"]
)
def test_invalid_names_are_refused(name: str) -> None:
    with pytest.raises(AdapterError) as caught:
        check_name(name, served_model="base")
    assert caught.value.code == "bad_name"


@pytest.mark.parametrize("name", ["a", "org/adapter:v2", "name with blanks", "Ünïcode", "x" * 200, "base2"])
def test_valid_names_are_accepted(name: str) -> None:
    check_name(name, served_model="base")
