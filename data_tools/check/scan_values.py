"""The inner loop of the check: every value of a block of rows, looked at once.

Axes: N rows of the block, M columns, NNZ stored values.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

SALTS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)
_SALT_0, _SALT_1 = np.uint64(SALTS[0]), np.uint64(SALTS[1])
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)

NONZERO, FRACTIONAL, NEGATIVE, NOT_FINITE = range(4)
OFF_BY, MINIMUM, MAXIMUM, TOTAL, SQUARES = range(5)


@numba.njit(inline="always")
def _mix(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> _30)) * _FIRST
    x = (x ^ (x >> _27)) * _SECOND
    return x ^ (x >> _31)


@numba.njit(cache=True, nogil=True)
def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits each (the finaliser of splitmix64, Steele et al. 2014)."""
    out = np.empty_like(values)
    for i in range(len(values)):
        out[i] = _mix(values[i])
    return out


@numba.njit(cache=True, nogil=True, error_model="numpy")
def scan_values(
    indptr: NDArray[np.integer[Any]],
    columns: NDArray[np.integer[Any]],
    data: NDArray[Any],
    wanted: NDArray[np.bool_],
    keys: NDArray[np.uint64],
    counts: NDArray[np.int64],
    figures: NDArray[np.float64],
    histogram: NDArray[np.int64],
    column_cells: NDArray[np.int64],
    library: NDArray[np.float64],
    detected: NDArray[np.int64],
    fingerprint: NDArray[np.uint64],
    bad: NDArray[np.int64],
) -> int:
    """Add the values of a block to the statistics of the matrix; return how many entries of ``bad`` were filled.

    Parameters
    ----------
    indptr, columns, data
        CSR of N rows; zeros may be stored, and columns be in any order.
    wanted
        ``[M]``: columns that count.
    keys
        ``[M]``: a hash of each column's gene.
    counts
        ``[4]``, added to: values that are not 0, fractional, negative, not finite.
    figures
        ``[5]``, updated: distance from an integer at most, minimum, maximum, sum, sum of squares.
    histogram
        ``[CAP + 1]``, added to: how often each count occurs.
    column_cells
        ``[M]``, added to: cells in which a column is not 0.
    library, detected, fingerprint
        ``[N]``, ``[N]``, ``[N, 2]``, written: each row's sum, number of values and hash.
    bad
        Entries ``(row, place in data)`` of negative or not finite values, as many as there is room for.
    """
    cap = len(histogram) - 1
    one = np.empty(1, np.float64)
    bits = one.view(np.uint64)
    found = 0
    for row in range(len(indptr) - 1):
        total, n = 0.0, 0
        print_0, print_1 = np.uint64(0), np.uint64(0)
        for at in range(indptr[row], indptr[row + 1]):
            column = columns[at]
            value = float(data[at])
            if value == 0 or not wanted[column]:
                continue
            n += 1
            finite = np.isfinite(value)
            if not finite or value < 0:
                if found < len(bad):
                    bad[found, 0], bad[found, 1] = row, at
                    found += 1
                if value < 0:
                    counts[NEGATIVE] += 1
                if not finite:
                    counts[NOT_FINITE] += 1
                    value = 0.0
            whole = np.rint(value)
            off = abs(value - whole)
            if off > 0:
                counts[FRACTIONAL] += 1
                figures[OFF_BY] = max(figures[OFF_BY], off)
            figures[MINIMUM] = min(figures[MINIMUM], value)
            figures[MAXIMUM] = max(figures[MAXIMUM], value)
            figures[SQUARES] += value * value
            histogram[np.int64(min(max(whole, 0.0), np.float64(cap)))] += 1
            column_cells[column] += 1
            total += value
            one[0] = value
            key = keys[column]
            # sums modulo 2^64 do not depend on the order of the genes
            print_0 += _mix(key ^ _mix(bits[0] + _SALT_0))
            print_1 += _mix(key ^ _mix(bits[0] + _SALT_1))
        counts[NONZERO] += n
        figures[TOTAL] += total
        library[row], detected[row] = total, n
        fingerprint[row, 0], fingerprint[row, 1] = print_0, print_1
    return found


@numba.njit(cache=True, nogil=True)
def sum_expm1(
    indptr: NDArray[np.integer[Any]],
    columns: NDArray[np.integer[Any]],
    data: NDArray[Any],
    wanted: NDArray[np.bool_],
    out: NDArray[np.float64],
) -> None:
    """Write the sum of exp(value) - 1 over each row's finite values, those above 50 taken as 50, into ``[N]``."""
    for row in range(len(indptr) - 1):
        total = 0.0
        for at in range(indptr[row], indptr[row + 1]):
            value = float(data[at])
            if wanted[columns[at]] and np.isfinite(value):
                total += np.expm1(min(value, 50.0))
        out[row] = total
