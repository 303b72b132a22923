"""The sparse first layer on a CPU, compiled: the same product serves the layer and, transposed, its gradient.

Axes: B rows, G columns, H outputs, NNZ stored values.
"""

from __future__ import annotations

import numba
import numpy as np

from bgen.arrays import F32, I32, I64
from bgen.nn.cpu.elementary import log1p


@numba.njit(cache=True, nogil=True, parallel=True)
def product(indptr: I64, indices: I32, values: F32, dense: F32, parts: int, out: F32) -> None:
    """Write ``out [B, H]`` = CSR ``[B, G]`` @ ``dense [G, H]``, in ``parts`` at a time."""
    for part in numba.prange(parts):
        _rows(indptr, indices, values, dense, len(out) * part // parts, len(out) * (part + 1) // parts, out)


@numba.njit(cache=True, nogil=True, forceinline=True, fastmath={"contract", "nsz"})
def _rows(indptr: I64, indices: I32, values: F32, dense: F32, begin: int, end: int, out: F32) -> None:
    """Write the rows from ``begin`` to ``end``.

    Four stored values at a time: then the row of ``out`` is read and written a quarter as often.
    """
    width = dense.shape[1]
    for row in range(begin, end):
        into = out[row]
        into[:] = 0
        entry, last = indptr[row], indptr[row + 1]
        while entry + 4 <= last:
            v, w, x, y = values[entry], values[entry + 1], values[entry + 2], values[entry + 3]
            a, b, c, d = (
                dense[indices[entry]],
                dense[indices[entry + 1]],
                dense[indices[entry + 2]],
                dense[indices[entry + 3]],
            )
            for h in range(width):
                into[h] += (v * a[h] + w * b[h]) + (x * c[h] + y * d[h])
            entry += 4
        while entry < last:
            v, a = values[entry], dense[indices[entry]]
            for h in range(width):
                into[h] += v * a[h]
            entry += 1


@numba.njit(cache=True, nogil=True, parallel=True)
def transpose(indptr: I64, indices: I32, values: F32, columns: int, parts: int) -> tuple[I64, I32, F32]:
    """Return the transpose of a CSR matrix with ascending indices, as CSR, by counting; rows stay in order.

    Each of the ``parts`` takes a range of the columns, which in every row is a range of its entries.
    """
    starts = np.zeros(columns + 1, np.int64)
    rows, moved = np.empty(len(indices), np.int32), np.empty(len(indices), np.float32)
    height = len(indptr) - 1
    begins = np.empty((parts + 1, height), np.int64)
    for part in numba.prange(parts + 1):
        for row in range(height):
            first, last = indptr[row], indptr[row + 1]
            begins[part, row] = first + np.searchsorted(indices[first:last], columns * part // parts)
    for part in numba.prange(parts):
        for row in range(height):
            for entry in range(begins[part, row], begins[part + 1, row]):
                starts[indices[entry] + 1] += 1
    for column in range(columns):
        starts[column + 1] += starts[column]
    free = starts[:-1].copy()
    for part in numba.prange(parts):
        for row in range(height):
            for entry in range(begins[part, row], begins[part + 1, row]):
                at = free[indices[entry]]
                free[indices[entry]] = at + 1
                rows[at], moved[at] = row, values[entry]
    return starts, rows, moved


@numba.njit(cache=True, nogil=True, parallel=True)
def log_normalise(indptr: I64, counts: F32, scale: float, parts: int, out: F32) -> None:
    """Write ``log(1 + scale * count / max(1, sum of its row))`` into ``out [NNZ]``."""
    rows = len(indptr) - 1
    for part in numba.prange(parts):
        for row in range(rows * part // parts, rows * (part + 1) // parts):
            given, into = counts[indptr[row] : indptr[row + 1]], out[indptr[row] : indptr[row + 1]]
            _log1p_of(given, np.float32(scale / max(np.float32(1), _sum(given))), into)


@numba.njit(cache=True, nogil=True, forceinline=True, fastmath=True)
def _sum(values: F32) -> np.float32:
    total = np.float32(0)
    for value in values:
        total += value
    return total


@numba.njit(cache=True, nogil=True, forceinline=True, error_model="numpy", fastmath={"contract", "nsz"})
def _log1p_of(values: F32, factor: np.float32, out: F32) -> None:
    for entry in range(len(values)):
        out[entry] = log1p(values[entry] * factor)
