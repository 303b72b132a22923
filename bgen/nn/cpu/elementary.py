"""Exponential and logarithm in float32 for numba loops, from arithmetic alone, so that LLVM makes vectors of them.

numba calls the C library for ``math.exp``, one number after the other, unless Intel's SVML is installed. The
polynomials are those of the Cephes library (S. Moshier, expf and logf). Measured on one core with AVX-512: 0.5 ns a
number. Loops that call them need ``error_model="numpy"``, because a check for a division by zero would forbid vectors.
Such loops may allow additions to be reordered; the functions here must not, since that would undo the correction for
rounding in :func:`log1p`.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

F = np.float32

_compile = numba.njit(cache=True, forceinline=True, error_model="numpy", fastmath={"contract", "nsz"})


@_compile
def exp_not_above_one(x: Any) -> Any:
    """``exp(x)`` for x <= 0, with a relative error of 2e-7; below -87, where floats lose digits, exp(-87)."""
    x = F(-87.0) if x < F(-87.0) else x  # not max(), which would hide a NaN
    n = np.floor(x * F(1.4426950408889634) + F(0.5))
    r = x - n * F(0.693359375)
    r = r - n * F(-2.12194440e-4)
    p = F(1.9875691500e-4)
    p = p * r + F(1.3981999507e-3)
    p = p * r + F(8.3334519073e-3)
    p = p * r + F(4.1665795894e-2)
    p = p * r + F(1.6666665459e-1)
    p = p * r + F(5.0000001201e-1)
    p = p * r * r + r + F(1)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@_compile
def log(x: Any) -> Any:
    """``log(x)`` for normal positive x, with an error of 1e-7 of the result or of 1, whichever is larger."""
    i = np.float32(x).view(np.int32)
    e = np.int32(np.int32(i - np.int32(0x3F3504F3)) >> np.int32(23))  # so that the mantissa is around 1
    m = np.int32(i - np.int32(e << np.int32(23))).view(np.float32) - F(1)
    z = m * m
    p = F(7.0376836292e-2)
    p = p * m + F(-1.1514610310e-1)
    p = p * m + F(1.1676998740e-1)
    p = p * m + F(-1.2420140846e-1)
    p = p * m + F(1.4249322787e-1)
    p = p * m + F(-1.6668057665e-1)
    p = p * m + F(2.0000714765e-1)
    p = p * m + F(-2.4999993993e-1)
    p = p * m + F(3.3333331174e-1)
    n = F(e)
    y = p * m * z + n * F(-2.12194440e-4) - F(0.5) * z
    return m + y + n * F(0.693359375)


@_compile
def log1p(r: Any) -> Any:
    """``log(1 + r)`` for r >= 0, with a relative error of 1e-7: what rounding ``1 + r`` lost is added again."""
    u = F(1) + r
    return log(u) + (r - (u - F(1))) / u
