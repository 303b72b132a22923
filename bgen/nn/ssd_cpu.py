"""What of the chunked SSD is no matrix product, on a CPU in float32, compiled: a few chunks at a time, in its caches.

Axes: N chunks, K groups, R heads per group, Q points of a chunk, P channels.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from bgen.nn.cpu_math import exp_not_above_one

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

F = np.float32
LANES = 16
"""Row i is computed up to the next multiple of it, so that its vectors are whole; what lies beyond i is 0."""


def _compile(**flags: Any) -> Any:
    return numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "nsz"}, **flags)


@_compile(forceinline=True)
def _decay(totals: F32, i: int, j: int, first: int) -> Any:
    found = exp_not_above_one(min(totals[i] - totals[j], F(0)))
    return found if (j >= first) & (j <= i) else F(0)


@_compile(parallel=True)
def weights(total: F32, cb: F32, first: I64, parts: int, out: F32) -> None:
    """Write ``cb_ij exp(total_i - total_j)`` for first_i <= j <= i into ``out [N, K, R, Q, Q]``.

    ``total [N, K, R, Q]``, ``cb [N, K, Q, Q]``, ``first [1 or N, Q]``. Above the diagonal ``out`` has to be 0 before.
    """
    heads = total.shape[0] * total.shape[1] * total.shape[2]
    for part in numba.prange(parts):
        _weights(total, cb, first, heads * part // parts, heads * (part + 1) // parts, out)


@_compile()
def _weights(total: F32, cb: F32, first: I64, begin: int, end: int, out: F32) -> None:
    K, R, Q = total.shape[1:]
    for head in range(begin, end):
        n, k, r = head // (K * R), head // R % K, head % R
        totals, firsts = total[n, k, r], first[n % len(first)]
        for i in range(Q):
            products, into, first_i = cb[n, k, i], out[n, k, r, i], firsts[i]
            for j in range(min(Q, (i // LANES + 1) * LANES)):
                into[j] = products[j] * _decay(totals, i, j, first_i)


@_compile(parallel=True)
def decayed_sum(total: F32, values: F32, first: I64, parts: int, out: F32) -> None:
    """Write ``out [N, K, Q, Q]``, the sum of ``values_ij exp(total_i - total_j)`` over the heads of each group."""
    rows = out.shape[0] * out.shape[1] * out.shape[2]
    for part in numba.prange(parts):
        _decayed_sum(total, values, first, rows * part // parts, rows * (part + 1) // parts, out)


@_compile()
def _decayed_sum(total: F32, values: F32, first: I64, begin: int, end: int, out: F32) -> None:
    K, R, Q = total.shape[1:]
    for row in range(begin, end):
        n, k, i = row // (K * Q), row // Q % K, row % Q
        into, first_i = out[n, k, i], first[n % len(first), i]
        into[:] = 0
        for r in range(R):
            totals, given = total[n, k, r], values[n, k, r, i]
            for j in range(min(Q, (i // LANES + 1) * LANES)):
                into[j] += given[j] * _decay(totals, i, j, first_i)


@_compile(parallel=True)
def join(within: F32, carried: F32, factor: F32, parts: int, out: F32) -> None:
    """Write ``within [N, K, R, Q, P] + factor [N, Q, K, R] * carried [N, K, Q, R, P]`` into ``out [N, Q, K, R, P]``."""
    rows = out.shape[0] * out.shape[1]
    for part in numba.prange(parts):
        _join(within, carried, factor, rows * part // parts, rows * (part + 1) // parts, out)


@_compile()
def _join(within: F32, carried: F32, factor: F32, begin: int, end: int, out: F32) -> None:
    _, Q, K, R, P = out.shape
    for row in range(begin, end):
        n, q = row // Q, row % Q
        for k in range(K):
            for r in range(R):
                into, near, far, by = out[n, q, k, r], within[n, k, r, q], carried[n, k, q, r], factor[n, q, k, r]
                for p in range(P):
                    into[p] = near[p] + by * far[p]


@numba.njit(cache=True, nogil=True, parallel=True)
def difference(dy: F32, y: F32, x: F32, dx: F32, parts: int, out: F32) -> None:
    """Write ``out [N, K, R, Q]``, the sum over the channels of ``dy * y - x * dx``, all ``[N, Q, K, R, P]``."""
    rows = dy.shape[0] * dy.shape[1]
    for part in numba.prange(parts):
        _difference(dy, y, x, dx, rows * part // parts, rows * (part + 1) // parts, out)


@numba.njit(cache=True, nogil=True, fastmath={"contract", "nsz", "reassoc"})
def _difference(dy: F32, y: F32, x: F32, dx: F32, begin: int, end: int, out: F32) -> None:
    _, Q, K, R, P = dy.shape
    for row in range(begin, end):
        n, q = row // Q, row % Q
        for k in range(K):
            for r in range(R):
                a, b, c, d = dy[n, q, k, r], y[n, q, k, r], x[n, q, k, r], dx[n, q, k, r]
                ab, cd = F(0), F(0)
                for p in range(P):
                    ab += a[p] * b[p]
                    cd += c[p] * d[p]
                out[n, k, r, q] = ab - cd
