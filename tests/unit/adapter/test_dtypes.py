"""Conversion to narrower dtypes agrees with torch for all relevant bit patterns, and with numpy for float16."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraserve.adapter.dtypes import all_finite, convert_elements, from_float32, to_float32


def _torch_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_narrowing_to_bfloat16_is_torchs(bits: list[int]) -> None:
    values = np.array(bits, dtype=np.uint32).view(np.float32)
    numbers = values[~np.isnan(values)]
    assert np.array_equal(from_float32(numbers, "bfloat16"), _torch_bits(numbers))
    assert np.isnan(to_float32(from_float32(values[np.isnan(values)], "bfloat16"), "bfloat16")).all()


def test_ties_go_to_the_even_neighbour() -> None:
    halves = np.array([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F7FFFFF], dtype=np.uint32).view(np.float32)
    assert from_float32(halves, "bfloat16").tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80]


def test_every_bfloat16_survives_the_way_through_float32() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    finite = bits[(bits & 0x7F80) != 0x7F80]
    assert np.array_equal(convert_elements(to_float32(finite, "bfloat16"), "float32", "bfloat16"), finite)


def test_finite_is_seen_in_every_dtype() -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        for value, finite in ((1.0, True), (np.inf, False), (-np.inf, False), (np.nan, False), (1e-40, True)):
            values = from_float32(np.array([0.0, value], dtype=np.float32), dtype)
            assert all_finite(values, dtype) is finite, (dtype, value)


def test_values_beyond_float16_become_infinite() -> None:
    assert not all_finite(convert_elements(np.array([70000.0], dtype=np.float32), "float32", "float16"), "float16")
