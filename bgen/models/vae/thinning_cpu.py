"""Binomial thinning on a CPU: one compiled pass over the counts instead of some thirty over temporary arrays.

Measured at B = 1,024 cells of 476 genes, half of them thinned, on one thread: 2.6 ms instead of 17.

Axes: B cells, NNZ non-zero counts.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from bgen.arrays import F32, I64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_1, _27, _30, _31, _41 = (np.uint64(n) for n in (1, 27, 30, 31, 41))
_HALF, _ONE, _TWO, _UNIT = np.float32(0.5), np.float32(1), np.float32(2), np.float32(2.0**-23)


@numba.njit(cache=True, nogil=True, parallel=True)
def thin_small(
    indptr: I64,
    indices: NDArray[np.int32],
    counts: F32,
    state: NDArray[np.uint64],
    chosen: NDArray[np.bool_],
    keep: F32,
    most: int,
    parts: int,
) -> tuple[F32, I64, I64]:
    """Thin the counts up to ``most`` by the exact binomial, as :func:`bgen.models.vae.thinning.binomial` does.

    Parameters
    ----------
    indptr, indices, counts
        The batch's.
    state
        ``[B]``: where the cells' sequences of random bits start.
    chosen, keep
        ``[B]``: which cells are thinned, and the share of their counts that they keep.
    most
        Counts above it are left.
    parts
        How many parts of the rows to take at a time.

    Returns
    -------
    The counts ``[NNZ]``, and positions and rows of the larger ones in chosen cells, which are left as they were.
    """
    out = counts.copy()
    large, large_rows = np.empty(len(counts), np.int64), np.empty(len(counts), np.int64)
    found = np.zeros(parts, np.int64)
    cells = len(chosen)
    for part in numba.prange(parts):
        begin, end = cells * part // parts, cells * (part + 1) // parts
        found[part] = _rows(indptr, indices, counts, state, chosen, keep, most, begin, end, out, large, large_rows)
    total = 0
    for part in range(parts):
        begin = indptr[cells * part // parts]
        for number in range(found[part]):
            large[total], large_rows[total] = large[begin + number], large_rows[begin + number]
            total += 1
    return out, large[:total].copy(), large_rows[:total].copy()


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _rows(
    indptr: I64,
    indices: NDArray[np.int32],
    counts: F32,
    state: NDArray[np.uint64],
    chosen: NDArray[np.bool_],
    keep: F32,
    most: int,
    begin: int,
    end: int,
    out: F32,
    large: I64,
    large_rows: I64,
) -> int:
    """Thin the rows from ``begin`` to ``end``; note which entries were left, and return how many.

    Most counts are 1 or 2, and need at most two steps up the distribution; these are computed without a branch.
    """
    none_removed = np.ones(most + 1, np.float32)  # probability by count
    longest = 0
    for row in range(begin, end):
        longest = max(longest, indptr[row + 1] - indptr[row])
    uniform, further = np.empty(longest, np.float32), np.empty(longest, np.bool_)
    left = indptr[begin]
    for row in range(begin, end):
        if not chosen[row]:
            continue
        p = _ONE - keep[row]
        kept = _ONE - p
        odds = p / kept
        for n in range(most):
            none_removed[n + 1] = none_removed[n] * kept
        first, last = indptr[row], indptr[row + 1]
        given, genes, into = counts[first:last], indices[first:last], out[first:last]
        _two_steps(given, genes, state[row], none_removed, odds, uniform, further, into)
        for entry in range(last - first):
            if not further[entry]:
                continue
            n = given[entry]
            if n > most:
                large[left], large_rows[left] = first + entry, row
                left += 1
                into[entry] = n
                continue
            probability = none_removed[int(n)]
            cumulative, k = probability, np.float32(0)
            while uniform[entry] > cumulative and k < n:
                probability *= (n - k) / (k + _ONE) * odds
                k += _ONE
                cumulative += probability
            into[entry] = n - k
    return left - indptr[begin]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _two_steps(
    counts: F32,
    genes: NDArray[np.int32],
    state: np.uint64,
    none_removed: F32,
    odds: np.float32,
    uniform: F32,
    further: NDArray[np.bool_],
    out: F32,
) -> None:
    """Thin a row as if no entry lost more than two; ``further`` marks entries for which that may be wrong."""
    most = np.float32(len(none_removed) - 1)
    for entry in range(len(counts)):
        n = counts[entry]
        bits = state + (np.uint64(genes[entry]) + _1) * _GOLDEN
        bits = (bits ^ (bits >> _30)) * _MIX_1
        bits = (bits ^ (bits >> _27)) * _MIX_2
        bits ^= bits >> _31
        u = (np.float32(bits >> _41) + _HALF) * _UNIT
        none = none_removed[int(min(n, most))]
        one = none + none * (n * odds)
        some, more = u > none, u > one
        out[entry] = n - np.float32(some & (n >= _ONE)) - np.float32(more & (n >= _TWO))
        uniform[entry] = u
        further[entry] = (n > most) | (more & (n > _TWO))
