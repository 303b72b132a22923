"""Binomial thinning on a CPU: one pass over the counts, compiled, instead of some thirty over temporary arrays.

Measured at B = 1,024 cells of 476 genes, half of them thinned, on one thread: 2.6 ms instead of 17.

Axes: B cells, NNZ non-zero counts.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ONE, _27, _30, _31, _41 = (np.uint64(n) for n in (1, 27, 30, 31, 41))
_HALF, _UNIT = np.float32(0.5), np.float32(2.0**-23)


@numba.njit(cache=True, nogil=True)
def thin_small(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    counts: F32,
    state: NDArray[np.uint64],
    chosen: NDArray[np.bool_],
    keep: F32,
    most: int,
) -> tuple[F32, NDArray[np.int64], NDArray[np.int64]]:
    """Thin the counts up to ``most`` by the exact binomial, as :func:`bgen.models.thinning.binomial` does.

    Parameters
    ----------
    indptr, indices, counts
        The batch's.
    state
        ``[B]``: where the cells' sequences of random bits start.
    chosen, keep
        ``[B]``: which cells are thinned, and the share of their counts that they keep.

    Returns
    -------
    The counts ``[NNZ]``, and positions and rows of the larger ones in chosen cells, which are left as they were.
    """
    out = counts.copy()
    large, large_rows, found = np.empty(len(counts), np.int64), np.empty(len(counts), np.int64), 0
    for row in range(len(chosen)):
        if not chosen[row]:
            continue
        p = np.float32(1) - keep[row]
        odds = p / (np.float32(1) - p)
        for entry in range(indptr[row], indptr[row + 1]):
            n = counts[entry]
            if n > most:
                large[found], large_rows[found] = entry, row
                found += 1
                continue
            bits = state[row] + (np.uint64(indices[entry]) + _ONE) * _GOLDEN
            bits = (bits ^ (bits >> _30)) * _MIX_1
            bits = (bits ^ (bits >> _27)) * _MIX_2
            bits ^= bits >> _31
            u = (np.float32(bits >> _41) + _HALF) * _UNIT
            probability = np.float32(1)
            for _ in range(int(n)):
                probability *= np.float32(1) - p
            cumulative, k = probability, np.float32(0)
            while u > cumulative and k < n:
                probability *= (n - k) / (k + np.float32(1)) * odds
                k += np.float32(1)
                cumulative += probability
            out[entry] = n - k
    return out, large[:found].copy(), large_rows[:found].copy()
