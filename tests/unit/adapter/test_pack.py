"""Packed slabs are compared with an independent reader of the same directory, which shares only numpy with them."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraserve.adapter.dtypes import from_float32, to_float32
from loraserve.adapter.format import ROW_ALIGN_ELEMENTS, decode_header, encode_header, seal_layout, slab_version
from loraserve.adapter.pack import pack_peft
from loraserve.errors import AdapterError
from loraserve.model_shape import MODULES
from loraserve.testing.peft_writer import PROJECTIONS, TINY_SHAPE, named_tensors, random_pairs, tensor_name, write_peft
from loraserve.testing.slabs import unpack_slab

DTYPES = ("float32", "float16", "bfloat16")
PLACES = [(layer, name) for layer in range(TINY_SHAPE.layers) for name in PROJECTIONS]


def _rounded(values: np.ndarray, *dtypes: str) -> np.ndarray:
    for dtype in dtypes:
        values = to_float32(from_float32(values, dtype), dtype)
    return values


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.dictionaries(st.sampled_from(PLACES), st.integers(1, 9), min_size=1),
    alphas=st.dictionaries(st.sampled_from(PLACES), st.integers(1, 64)),
    rslora=st.booleans(),
    source=st.sampled_from(DTYPES),
    target=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_unpacking_returns_the_packed_matrices(tmp_path, ranks, alphas, rslora, source, target, seed) -> None:
    pairs = random_pairs(TINY_SHAPE, ranks, seed)
    pattern = {tensor_name(*place, "A", "model.").removesuffix(".lora_A.weight"): r for place, r in ranks.items()}
    alpha_pattern = {
        tensor_name(*place, "A", "model.").removesuffix(".lora_A.weight"): a for place, a in alphas.items()
    }
    write_peft(
        tmp_path, named_tensors(pairs), source, r=77, lora_alpha=10, rank_pattern=pattern, alpha_pattern=alpha_pattern,
        use_rslora=rslora,
    )  # fmt: skip
    slab = pack_peft(tmp_path, TINY_SHAPE, target, max_rank=9)
    assert slab.header.rank == max(ranks.values())
    assert len(slab.data) == slab.header.slab_bytes
    assert slab.version == slab_version(decode_header(encode_header(slab.header)))
    assert slab.header == seal_layout(slab.header, bytes(slab.data))
    unpacked = unpack_slab(slab.header, slab.data)
    assert unpacked.keys() == pairs.keys()
    for place, (a, b) in pairs.items():
        got_a, got_b, scale = unpacked[place]
        assert np.array_equal(got_a, _rounded(a, source, target))
        assert np.array_equal(got_b, _rounded(b, source, target))
        rank = ranks[place]
        assert scale == alphas.get(place, 10) / (math.sqrt(rank) if rslora else rank)


def test_rows_lie_as_the_format_says(tmp_path: Path) -> None:
    """Stacked A of the slices present, in order, then each B transposed, at offsets read from the header alone."""
    pairs = random_pairs(TINY_SHAPE, {(0, "q_proj"): 2, (0, "v_proj"): 3, (1, "up_proj"): 1})
    write_peft(tmp_path, named_tensors(pairs), rank_pattern={"q_proj": 2, "v_proj": 3, "up_proj": 1})
    slab = pack_peft(tmp_path, TINY_SHAPE, "float32", 8)
    elements = np.frombuffer(slab.data, dtype=np.float32)
    row = slab.header.row(0, MODULES.index("qkv"))
    expected = [pairs[0, "q_proj"][0], pairs[0, "v_proj"][0], pairs[0, "q_proj"][1].T, pairs[0, "v_proj"][1].T]
    flat = np.concatenate([part.reshape(-1) for part in expected])
    assert row.ranks == (2, 0, 3)
    assert np.array_equal(elements[row.offset : row.offset + len(flat)], flat)
    assert all(row.offset % ROW_ALIGN_ELEMENTS == 0 for row in slab.header.rows)
    assert len(slab.header.rows) == TINY_SHAPE.layers * len(MODULES)
    assert {row.total_rank for row in slab.header.rows} == {0, 1, 5}


def test_the_version_depends_on_content_alone(tmp_path: Path) -> None:
    tensors = named_tensors(random_pairs(TINY_SHAPE, 8))
    versions = {
        pack_peft(write_peft(tmp_path / "a", tensors), TINY_SHAPE, "bfloat16", 8).version,
        pack_peft(write_peft(tmp_path / "b", dict(reversed(tensors.items()))), TINY_SHAPE, "bfloat16", 8).version,
        pack_peft(write_peft(tmp_path / "c", tensors, base_model_name_or_path="x"), TINY_SHAPE, "bfloat16", 8).version,
    }
    assert len(versions) == 1
    other = pack_peft(write_peft(tmp_path / "d", tensors, lora_alpha=17), TINY_SHAPE, "bfloat16", 8).version
    assert other not in versions


@pytest.mark.parametrize("prefix", ["base_model.model.model.", "base_model.model."])
@pytest.mark.parametrize("infix", ["", ".default"])
def test_both_spellings_of_names_are_read(tmp_path: Path, prefix: str, infix: str) -> None:
    pairs = random_pairs(TINY_SHAPE, {(1, "o_proj"): 8})
    tensors = {
        tensor_name(1, "o_proj", matrix, prefix).replace(".weight", f"{infix}.weight"): values
        for matrix, values in zip("AB", pairs[1, "o_proj"], strict=True)
    }
    slab = pack_peft(write_peft(tmp_path, tensors), TINY_SHAPE, "float32", 8)
    assert np.array_equal(unpack_slab(slab.header, slab.data)[1, "o_proj"][0], pairs[1, "o_proj"][0])


def test_the_first_pattern_that_matches_the_end_of_the_name_wins(tmp_path: Path) -> None:
    pairs = random_pairs(TINY_SHAPE, {(0, "q_proj"): 2, (1, "q_proj"): 4, (0, "k_proj"): 8})
    write_peft(
        tmp_path,
        named_tensors(pairs),
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 2, ".*q_proj": 4, "_proj": 3},
        alpha_pattern={r"^model\.layers\.1\.self_attn\.(q|v)_proj": 6, "layers.q_proj": 5, "q_proj": 7},
    )
    slab = pack_peft(tmp_path, TINY_SHAPE, "float32", 8)
    scales = {place: matrices[2] for place, matrices in unpack_slab(slab.header, slab.data).items()}
    assert scales == {(0, "q_proj"): 7 / 2, (1, "q_proj"): 6 / 4, (0, "k_proj"): 16 / 8}


def test_unpack_refuses_bytes_of_another_length(tmp_path: Path) -> None:
    slab = pack_peft(
        write_peft(tmp_path, named_tensors(random_pairs(TINY_SHAPE, 8))), TINY_SHAPE, "float32", max_rank=8
    )
    with pytest.raises(ValueError, match="its header says"):
        unpack_slab(slab.header, slab.data[:-4])


def test_values_that_the_target_cannot_hold_are_refused_with_the_remedy(tmp_path: Path) -> None:
    pairs = random_pairs(TINY_SHAPE, {(0, "q_proj"): 8})
    pairs[0, "q_proj"][1][3, 3] = 1e6
    write_peft(tmp_path, named_tensors(pairs))
    with pytest.raises(AdapterError, match=r"1e\+06, too large for float16; .*engine.slab_dtype") as caught:
        pack_peft(tmp_path, TINY_SHAPE, "float16", 8)
    assert caught.value.code == "not_finite"
    pack_peft(tmp_path, TINY_SHAPE, "bfloat16", 8)
