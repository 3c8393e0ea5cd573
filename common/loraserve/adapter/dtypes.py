"""Element types of adapters without torch: numpy has no bfloat16, so its values travel as their bit patterns.

``storage`` names the numpy type that holds a dtype's elements: float32 and float16 as themselves, bfloat16 as uint16.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraserve.adapter.format import Dtype

Elements = NDArray[Any]
"""Elements of a dtype in its storage type."""

_STORAGE: dict[Dtype, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
_BF16_EXPONENT = np.uint16(0x7F80)
_BF16_NAN = np.uint16(0x7FC0)


def storage_dtype(dtype: Dtype) -> np.dtype[Any]:
    """The numpy type that holds elements of ``dtype``, little-endian."""
    return _STORAGE[dtype]


def all_finite(values: Elements, dtype: Dtype) -> bool:
    """Whether no element is infinite or not a number."""
    if dtype == "bfloat16":
        return bool(((values & _BF16_EXPONENT) != _BF16_EXPONENT).all())
    return bool(np.isfinite(values).all())


def convert_elements(values: Elements, source: Dtype, target: Dtype) -> Elements:
    """The same numbers as ``target``, rounded to nearest even where it is narrower; too large becomes infinite."""
    if source == target:
        return values
    return from_float32(to_float32(values, source), target)


def to_float32(values: Elements, dtype: Dtype) -> NDArray[np.float32]:
    """Exact."""
    if dtype == "bfloat16":
        return (values.astype("<u4") << np.uint32(16)).view("<f4")
    return values.astype("<f4", copy=False)


def from_float32(values: NDArray[np.float32], dtype: Dtype) -> Elements:
    """Rounded to nearest even; what is too large becomes infinite, NaN stays NaN."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(_STORAGE[dtype], copy=False)
    bits = np.ascontiguousarray(values).view("<u4")
    # Adding just under half of the dropped part, plus the kept part's last bit, carries exactly when the nearest even
    # neighbour is the upper one.
    nearest = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    rounded: Elements = (nearest >> np.uint32(16)).astype("<u2")
    rounded[np.isnan(values)] = _BF16_NAN
    return rounded
