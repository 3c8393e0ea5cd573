"""Converts adapter elements without torch. numpy has no bfloat16, so uint16 arrays store bfloat16 bit patterns."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraserve.adapter.format import Dtype

Elements = NDArray[Any]
"""An array of elements in the numpy type that ``storage_dtype`` returns for their dtype."""

_STORAGE: dict[Dtype, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
_BF16_EXPONENT = np.uint16(0x7F80)
_BF16_NAN = np.uint16(0x7FC0)


def storage_dtype(dtype: Dtype) -> np.dtype[Any]:
    """Return the little-endian numpy type that stores elements of ``dtype``."""
    return _STORAGE[dtype]


def all_finite(values: Elements, dtype: Dtype) -> bool:
    """Return whether all elements are finite."""
    if dtype == "bfloat16":
        return bool(((values & _BF16_EXPONENT) != _BF16_EXPONENT).all())
    return bool(np.isfinite(values).all())


def convert_elements(values: Elements, source: Dtype, target: Dtype) -> Elements:
    """Convert elements to ``target``, rounding to nearest even. Values beyond the target's range become infinite."""
    if source == target:
        return values
    return from_float32(to_float32(values, source), target)


def to_float32(values: Elements, dtype: Dtype) -> NDArray[np.float32]:
    """Convert elements to float32 without loss."""
    if dtype == "bfloat16":
        return (values.astype("<u4") << np.uint32(16)).view("<f4")
    return values.astype("<f4", copy=False)


def from_float32(values: NDArray[np.float32], dtype: Dtype) -> Elements:
    """Convert from float32, rounding to nearest even. Values outside the range become infinite; NaN stays NaN."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(_STORAGE[dtype], copy=False)
    bits = np.ascontiguousarray(values).view("<u4")
    # Rounding drops the low 16 bits. Adding 0x7FFF plus the lowest kept bit carries into the kept bits exactly if the
    # upper neighbour is nearer, or is the even one of two equally near neighbours.
    nearest = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    rounded: Elements = (nearest >> np.uint32(16)).astype("<u2")
    rounded[np.isnan(values)] = _BF16_NAN
    return rounded
