"""Elementary functions for kernels whose loops the compiler turns into vector code."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from loraserve.kernels.compiled import inlined


def _power_of_two(typingctx: Any, exponent: Any) -> Any:
    """2**exponent for a whole exponent between -126 and 127, given as float32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i32 = ir.IntType(32)
        biased = builder.add(builder.fptosi(arguments[0], i32), ir.Constant(i32, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(i32, 23)), ir.FloatType())

    return types.float32(types.float32), codegen


_power: Any = intrinsic(_power_of_two)


@inlined
def exp(x):  # type: ignore[no-untyped-def]
    """e**x for x <= 0 within 2 ulp, in plain operations that vectorise to the same bits (Cephes' expf)."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = (x - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    value = p * (r * r) + r + np.float32(1.0)
    return value * _power(n)
