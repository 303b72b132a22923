"""The passes of :mod:`bgen.models.likelihoods.sparse` over a batch on a CPU, compiled: one forward and one backward,
row by row.

A row of genes stays in the nearest cache from its softmax to its sum, and the exponential and both logarithms are made
eight or sixteen at a time (:mod:`bgen.nn.cpu.elementary`). Measured at B = 1,024, G = 2,000, 450 non-zeros a cell,
forward and backward on one thread: 10 ms; the same in torch, in blocks of rows that stay in the cache, 23 to 33.

Axes: B cells, G genes, NNZ non-zero counts.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from bgen.arrays import F32
from bgen.nn.cpu.elementary import exp_not_above_one, log, log1p

F = np.float32

_TINY = np.float32(np.finfo(np.float32).tiny)
TABLED = 16
"""Counts below this are looked up in a table, since their share of a gene's log-probability is the same in all cells.
"""

_compile = numba.njit(
    cache=True, nogil=True, forceinline=True, error_model="numpy", fastmath={"contract", "nsz", "reassoc"}
)


_in_parts = numba.njit(cache=True, nogil=True, parallel=True)


@_compile
def _forward(
    logits: F32,
    log_theta: F32,
    theta: F32,
    terms: F32,
    library: F32,
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    counts: F32,
    begin: int,
    end: int,
    ratio: F32,
    out: F32,
) -> None:
    inverse = F(1) / theta
    for row in range(begin, end):
        z, r = logits[row], ratio[row]
        top = F(-np.inf)
        for g in range(len(z)):
            top = max(top, z[g])
        total = F(0)
        for g in range(len(z)):
            r[g] = exp_not_above_one(z[g] - top)
            total += r[g]
        scale = library[row] / total
        zeros = F(0)
        for g in range(len(z)):
            r[g] = r[g] * scale * inverse[g]
            zeros += theta[g] * log1p(r[g])
        # log mu - log(1 + r) = log theta + log q, q = r / (1 + r); where r underflowed, q is the smallest float
        linear = F(0)
        for entry in range(indptr[row], indptr[row + 1]):
            g = indices[entry]
            linear += counts[entry] * (log_theta[g] + log(max(r[g] / (F(1) + r[g]), _TINY)))
        rest = F(0)
        for entry in range(indptr[row], indptr[row + 1]):
            g, x = indices[entry], counts[entry]
            n = int(x)
            if n < TABLED and n == x:
                rest += terms[g, n]
            else:
                rest += F(_count_term(float(x), float(theta[g])))
        out[row] = linear + rest - zeros


@_compile
def _backward(
    grad: F32,
    theta: F32,
    slopes: F32,
    library: F32,
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    counts: F32,
    begin: int,
    end: int,
    ratio: F32,
    grad_logits: F32,
) -> F32:
    share = np.zeros(len(theta), np.float32)
    at_nonzero = np.zeros(len(theta), np.float32)
    for row in range(begin, end):
        r, out, weight = ratio[row], grad_logits[row], grad[row]
        total = F(0)
        for g in range(len(r)):
            total += theta[g] * (r[g] / (F(1) + r[g]))
        for entry in range(indptr[row], indptr[row + 1]):
            total -= counts[entry] / (F(1) + r[indices[entry]])
        rest = total / library[row]
        for g in range(len(r)):
            q = r[g] / (F(1) + r[g])
            out[g] = weight * theta[g] * (r[g] * rest - q)
            share[g] += weight * (q - log1p(r[g]))
        for entry in range(indptr[row], indptr[row + 1]):
            g, x = indices[entry], counts[entry]
            kept = F(1) / (F(1) + r[g])
            out[g] += weight * x * kept
            n, q = int(x), r[g] * kept
            if n < TABLED and n == x:
                slope = x * q + slopes[g, n]
            else:  # of a large count the two terms nearly cancel
                slope = F(float(x) * (float(r[g]) / (1 + float(r[g]))) + _gamma_ratio_slope(float(x), float(theta[g])))
            at_nonzero[g] += weight * slope
    return share * theta + at_nonzero


@_in_parts
def forward(
    parts: int,
    terms: F32,
    logits: F32,
    log_theta: F32,
    theta: F32,
    library: F32,
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    counts: F32,
    ratio: F32,
    out: F32,
) -> None:
    """Write ``ratio [B, G]`` = mu / theta and ``out [B]`` = log p(cell), in ``parts`` at a time."""
    rows = len(logits)
    for part in numba.prange(parts):
        begin, end = rows * part // parts, rows * (part + 1) // parts
        _forward(logits, log_theta, theta, terms, library, indptr, indices, counts, begin, end, ratio, out)


@_in_parts
def backward(
    parts: int,
    slopes: F32,
    grad: F32,
    theta: F32,
    library: F32,
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    counts: F32,
    ratio: F32,
    grad_logits: F32,
) -> F32:
    """Write ``grad_logits [B, G]`` in ``parts`` at a time; return each one's share of d log theta, ``[parts, G]``."""
    rows = len(ratio)
    shares = np.empty((parts, len(theta)), np.float32)
    for part in numba.prange(parts):
        begin, end = rows * part // parts, rows * (part + 1) // parts
        shares[part] = _backward(grad, theta, slopes, library, indptr, indices, counts, begin, end, ratio, grad_logits)
    return shares


@_compile
def tables(theta: F32) -> tuple[F32, F32]:
    """Return what the counts 0, 1, ... of each gene add to log p and to d log p / d log theta, ``[G, TABLED]``.

    By ``Gamma(theta + n) / Gamma(theta) = theta (theta + 1) ... (theta + n - 1)``.
    """
    terms, slopes = np.zeros((len(theta), TABLED), np.float32), np.zeros((len(theta), TABLED), np.float32)
    for n in range(2, TABLED):
        k = F(n - 1)
        log_n = F(math.log(n))
        for g in range(len(theta)):
            terms[g, n] = terms[g, n - 1] + log1p(k / theta[g]) - log_n
            slopes[g, n] = slopes[g, n - 1] - k / (theta[g] + k)
    return terms, slopes


@_compile
def _count_term(x: Any, theta: Any) -> Any:
    """``log Gamma(theta + x) - log Gamma(theta) - x log theta - log x!``, in float64."""
    # Stirling's formula at y + 4 after Gamma(y) = Gamma(y + 4) / (y (y + 1) (y + 2) (y + 3))
    low = theta + 4
    high = low + x
    product = 1.0
    for k in range(4):
        product *= 1 + x / (theta + k)
    found = (low - 0.5) * math.log1p(x / low) - x + x * math.log(high / theta) - math.log(product)
    return found + _stirling(high) - _stirling(low) - math.lgamma(x + 1)


@_compile
def _stirling(y: Any) -> Any:
    inverse = 1 / y
    square = inverse * inverse
    return inverse * (1 / 12 - square * (1 / 360 - square / 1260))


@_compile
def _gamma_ratio_slope(x: Any, theta: Any) -> Any:
    """``theta (digamma(theta + x) - digamma(theta)) - x``, in float64."""
    low = theta + 4
    high = low + x
    slope = math.log1p(x / low) + _digamma_rest(high) - _digamma_rest(low)
    for k in range(4):
        slope += x / ((theta + k) * (theta + x + k))
    return slope * theta - x


@_compile
def _digamma_rest(y: Any) -> Any:
    inverse = 1 / y
    square = inverse * inverse
    return -inverse / 2 - square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square / 240)))
