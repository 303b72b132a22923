"""Triton kernels of the likelihoods of sparse counts: forward and backward, without a float32 matrix of cells by genes.

Formulas and names are those of :mod:`bgen.models.likelihoods.sparse`, and of the zero-inflated form

    p(0) = pi + (1 - pi) exp(-theta L),    p(x) = (1 - pi) NB(x)  for x > 0,    pi = sigmoid(d).

What is stored between the passes is one number per cell, the normaliser of the softmax; everything else is computed
again from the logits, which may be bfloat16. Of each cell and gene the forward pass reads the logits twice (the second
time from the cache, if a row fits), the backward pass reads them twice and writes their gradient: in bfloat16 some 10
bytes, or 0.8 GB a step of 4,096 cells x 20,000 genes, of which torch's operators move 19.5 GB. At 4.3 TB/s (H200) that
is 0.2 ms, at 3.0 TB/s (H100) 0.3 ms; with some 60 operations for each cell and gene, of which 4 are transcendental,
arithmetic asks for about as long. Never measured: no GPU has run them. They are tested through Triton's interpreter.

Axes: B cells, G genes, NNZ non-zero counts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bgen.nn.gpu.elementary_triton import log1p as _log1p

GENES = 1024
"""Genes that a program holds at once."""

NONZEROS = 256
"""Non-zero counts that a program holds at once."""

TILE = 128
"""Genes of a tile in the backward pass, whose programs go down the cells."""

CELLS = 256
"""Cells that a program of the backward pass goes down; each gives a row of partial sums for the genes."""


@triton.jit
def _q_less_log1p(ratio, q):
    """q - log(1 + r) with q = r / (1 + r), which for small r is -r^2 / 2 and would be lost in the difference."""
    r = tl.minimum(ratio, 0.05)
    series = 0.5 - r * (2.0 / 3 - r * (0.75 - r * (0.8 - r * (5.0 / 6 - r * (6.0 / 7)))))
    return tl.where(ratio < 0.05, -r * r * series, q - _log1p(ratio))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _stirling(y):
    inverse = 1.0 / y
    square = inverse * inverse
    return inverse * (1.0 / 12 - square * (1.0 / 360 - square / 1260))


@triton.jit
def _nonzero_term(x, theta, log_q):
    """A(x, theta) - log x! + x (log q + log theta), q = r / (1 + r), for x >= 1.

    log x! is Stirling's formula, too, at y = x + 5, so that what is large goes before it is summed: x log(high / y).
    """
    low, y = theta + 4.0, x + 5.0
    ratio = (1 + x / theta) * (1 + x / (theta + 1)) * (1 + x / (theta + 2)) * (1 + x / (theta + 3))
    product = (x + 1.0) * (x + 2.0) * (x + 3.0) * (x + 4.0)
    large = (low - 0.5) * _log1p(x / low) + x * (log_q + _log1p((theta - 1.0) / y))
    return large + (5.0 - 0.9189385332046727 - 4.5 * tl.log(y) + tl.log(product)) + (
        _stirling(low + x) - _stirling(low) - _stirling(y) - tl.log(ratio)
    )  # fmt: skip


@triton.jit
def _digamma_rest(y):
    inverse = 1.0 / y
    square = inverse * inverse
    return -inverse / 2 - square * (1.0 / 12 - square * (1.0 / 120 - square * (1.0 / 252 - square / 240)))


@triton.jit
def _count_slope(x, theta):
    """theta dA/dtheta + x."""
    low = theta + 4.0
    high = low + x
    slope = _log1p(x / low) + _digamma_rest(high) - _digamma_rest(low)
    slope += x / (theta * (theta + x)) + x / ((theta + 1) * (theta + x + 1))
    slope += x / ((theta + 2) * (theta + x + 2)) + x / ((theta + 3) * (theta + x + 3))
    return theta * slope


@triton.jit
def _entries(entry, end, indices, counts, log_theta):
    """Of entries of a cell: whether it has them, their genes, counts (1 where it has none) and dispersions."""
    inside = entry < end
    gene = tl.load(indices + entry, inside, 0).to(tl.int64)
    return inside, gene, tl.load(counts + entry, inside, 1.0), tl.load(log_theta + gene, inside, 0.0)


@triton.jit
def _forward(
    logits, dropout, log_theta, log_library, indptr, indices, counts, log_prob, normaliser, genes,
    INFLATED: tl.constexpr, BLOCK: tl.constexpr, NNZ: tl.constexpr,
):  # fmt: skip
    """A cell: log p [B] and the normaliser of its softmax [B]."""
    row = tl.program_id(0).to(tl.int64)
    start = row * genes
    lane = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, genes, BLOCK):
        inside = first + lane < genes
        x = tl.load(logits + start + first + lane, inside, 0.0).to(tl.float32)
        x = tl.where(inside, x, -3.0e38)
        new = tl.maximum(most, x)
        total = total * tl.exp(most - new) + tl.exp(x - new)
        most = new
    peak = tl.max(most, 0)
    normal = peak + tl.log(tl.sum(total * tl.exp(most - peak), 0))
    tl.store(normaliser + row, normal)
    shift = tl.load(log_library + row) - normal
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, genes, BLOCK):
        gene = first + lane
        inside = gene < genes
        log_th = tl.load(log_theta + gene, inside, 0.0)
        x = tl.load(logits + start + gene, inside, 0.0).to(tl.float32)
        zero = -tl.exp(log_th) * _log1p(tl.exp(x + shift - log_th))
        if INFLATED:
            d = tl.load(dropout + start + gene, inside, 0.0).to(tl.float32)
            zero = tl.maximum(zero, d) + _log1p(tl.exp(-tl.abs(zero - d))) - _softplus(d)
        sums += tl.where(inside, zero, 0.0)
    answer = tl.sum(sums, 0)
    entry = tl.arange(0, NNZ)
    begin, end = tl.load(indptr + row), tl.load(indptr + row + 1)
    terms = tl.zeros([NNZ], tl.float32)
    for first in range(begin, end, NNZ):
        inside, gene, count, log_th = _entries(first + entry, end, indices, counts, log_theta)
        theta = tl.exp(log_th)
        log_r = tl.load(logits + start + gene, inside, 0.0).to(tl.float32) + shift - log_th
        bound = _log1p(tl.exp(log_r))
        log_q = tl.where(log_r > 0, -_log1p(tl.exp(-log_r)), log_r - bound)
        term = _nonzero_term(count, theta, log_q)
        if INFLATED:
            d = tl.load(dropout + start + gene, inside, 0.0).to(tl.float32)
            zero = -theta * bound
            term += zero - tl.maximum(zero, d) - _log1p(tl.exp(-tl.abs(zero - d)))
        terms += tl.where(inside, term, 0.0)
    tl.store(log_prob + row, answer + tl.sum(terms, 0))


@triton.jit
def _slopes(
    logits, dropout, log_theta, log_library, normaliser, indptr, indices, counts, summed, genes,
    INFLATED: tl.constexpr, BLOCK: tl.constexpr, NNZ: tl.constexpr,
):  # fmt: skip
    """A cell: the sum over its genes of d log p / d log mu [B], which the softmax takes away again."""
    row = tl.program_id(0).to(tl.int64)
    start = row * genes
    lane = tl.arange(0, BLOCK)
    shift = tl.load(log_library + row) - tl.load(normaliser + row)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, genes, BLOCK):
        gene = first + lane
        inside = gene < genes
        log_th = tl.load(log_theta + gene, inside, 0.0)
        theta = tl.exp(log_th)
        ratio = tl.exp(tl.load(logits + start + gene, inside, 0.0).to(tl.float32) + shift - log_th)
        slope = -theta * (ratio / (1.0 + ratio))
        if INFLATED:
            d = tl.load(dropout + start + gene, inside, 0.0).to(tl.float32)
            slope = slope * _sigmoid(-theta * _log1p(ratio) - d)
        sums += tl.where(inside, slope, 0.0)
    answer = tl.sum(sums, 0)
    entry = tl.arange(0, NNZ)
    begin, end = tl.load(indptr + row), tl.load(indptr + row + 1)
    terms = tl.zeros([NNZ], tl.float32)
    for first in range(begin, end, NNZ):
        inside, gene, count, log_th = _entries(first + entry, end, indices, counts, log_theta)
        theta = tl.exp(log_th)
        ratio = tl.exp(tl.load(logits + start + gene, inside, 0.0).to(tl.float32) + shift - log_th)
        q = ratio / (1.0 + ratio)
        change = count / (1.0 + ratio)
        if INFLATED:
            d = tl.load(dropout + start + gene, inside, 0.0).to(tl.float32)
            change += theta * q * (_sigmoid(-theta * _log1p(ratio) - d) - 1.0)
        terms += tl.where(inside, change, 0.0)
    tl.store(summed + row, answer + tl.sum(terms, 0))


@triton.jit
def _backward(
    logits, dropout, log_theta, log_library, normaliser, summed, grad, grad_logits, grad_dropout, partial, cells, genes,
    INFLATED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of genes and some cells: gradients as if all counts were zero, and their sums for log theta."""
    gene = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = gene < genes
    log_th = tl.load(log_theta + gene, inside, 0.0)
    theta = tl.exp(log_th)
    sums = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(1) * ROWS
    for row in range(first, min(first + ROWS, cells)):
        start = tl.cast(row, tl.int64) * genes
        weight, rest = tl.load(grad + row), tl.load(summed + row)
        normal, log_lib = tl.load(normaliser + row), tl.load(log_library + row)
        x = tl.load(logits + start + gene, inside, 0.0).to(tl.float32) - normal
        ratio = tl.exp(x + log_lib - log_th)
        q, bound = ratio / (1.0 + ratio), _log1p(ratio)
        slope, of_theta = -theta * q, theta * _q_less_log1p(ratio, q)
        if INFLATED:
            d = tl.load(dropout + start + gene, inside, 0.0).to(tl.float32)
            zero = _sigmoid(-theta * bound - d)
            slope, of_theta = slope * zero, of_theta * zero
            change = weight * ((1.0 - zero) - _sigmoid(d))
            tl.store(grad_dropout + start + gene, change.to(grad_dropout.dtype.element_ty), inside)
        change = weight * (slope - tl.exp(x) * rest)
        tl.store(grad_logits + start + gene, change.to(grad_logits.dtype.element_ty), inside)
        sums += weight * of_theta
    tl.store(partial + tl.program_id(1).to(tl.int64) * genes + gene, sums, inside)


@triton.jit
def _backward_at_nonzeros(
    logits, dropout, log_theta, log_library, normaliser, summed, grad, indptr, indices, counts,
    grad_logits, grad_dropout, grad_log_theta, genes, INFLATED: tl.constexpr, NNZ: tl.constexpr,
):  # fmt: skip
    """A cell: the gradients at its non-zero counts, instead of those of zeros; log theta's are corrected."""
    row = tl.program_id(0).to(tl.int64)
    start = row * genes
    entry = tl.arange(0, NNZ)
    weight, rest = tl.load(grad + row), tl.load(summed + row)
    normal, log_lib = tl.load(normaliser + row), tl.load(log_library + row)
    begin, end = tl.load(indptr + row), tl.load(indptr + row + 1)
    for first in range(begin, end, NNZ):
        inside, gene, count, log_th = _entries(first + entry, end, indices, counts, log_theta)
        theta = tl.exp(log_th)
        x = tl.load(logits + start + gene, inside, 0.0).to(tl.float32) - normal
        ratio = tl.exp(x + log_lib - log_th)
        q, bound = ratio / (1.0 + ratio), _log1p(ratio)
        slope = count / (1.0 + ratio) - theta * q
        of_theta = _count_slope(count, theta) - count / (1.0 + ratio)
        if INFLATED:
            d = tl.load(dropout + start + gene, inside, 0.0).to(tl.float32)
            of_theta += theta * _q_less_log1p(ratio, q) * (1.0 - _sigmoid(-theta * bound - d))
            change = -weight * _sigmoid(d)
            tl.store(grad_dropout + start + gene, change.to(grad_dropout.dtype.element_ty), inside)
        change = weight * (slope - tl.exp(x) * rest)
        tl.store(grad_logits + start + gene, change.to(grad_logits.dtype.element_ty), inside)
        tl.atomic_add(grad_log_theta + gene, weight * of_theta, inside)


def forward(
    logits: Tensor,
    dropout: Tensor | None,
    log_theta: Tensor,
    library: Tensor,
    indptr: Tensor,
    indices: Tensor,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return log p of each cell ``[B]`` and the normaliser of each softmax ``[B]``, both float32.

    Parameters
    ----------
    logits, dropout
        ``[B, G]``, float32, bfloat16 or float16, contiguous; ``dropout`` None: no zero inflation.
    log_theta, library
        float32 ``[G]``, ``[B]``.
    indptr, indices, counts
        The counts as CSR; float32 counts.
    """
    cells, genes = logits.shape
    log_prob, normaliser = (torch.empty(cells, device=logits.device) for _ in range(2))
    options: dict[str, Any] = {"INFLATED": dropout is not None, "BLOCK": GENES, "NNZ": NONZEROS}
    known = (logits, logits if dropout is None else dropout, log_theta, library.log(), indptr, indices, counts)
    _forward[(cells,)](*known, log_prob, normaliser, genes, **options)
    return log_prob, normaliser


def backward(
    grad: Tensor,
    normaliser: Tensor,
    logits: Tensor,
    dropout: Tensor | None,
    log_theta: Tensor,
    library: Tensor,
    indptr: Tensor,
    indices: Tensor,
    counts: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradients of logits and dropout, in their dtypes, and of log theta (float32 ``[G]``).

    ``grad [B]`` is that of log p; see :func:`forward` for the rest.
    """
    cells, genes = logits.shape
    inflated = dropout is not None
    grad_logits = torch.empty_like(logits)
    grad_dropout = torch.empty_like(dropout) if dropout is not None else grad_logits
    summed = torch.empty(cells, device=logits.device)
    parts = triton.cdiv(cells, CELLS)
    partial = torch.empty(parts, genes, device=logits.device)
    dense = (logits, logits if dropout is None else dropout, log_theta, library.log(), normaliser)
    csr = (indptr, indices, counts)
    _slopes[(cells,)](*dense, *csr, summed, genes, INFLATED=inflated, BLOCK=GENES, NNZ=NONZEROS)
    given, made = (*dense, summed, grad.contiguous()), (grad_logits, grad_dropout)
    grid = (triton.cdiv(genes, TILE), parts)
    _backward[grid](*given, *made, partial, cells, genes, INFLATED=inflated, BLOCK=TILE, ROWS=CELLS)
    grad_log_theta = partial.sum(0)
    _backward_at_nonzeros[(cells,)](*given, *csr, *made, grad_log_theta, genes, INFLATED=inflated, NNZ=NONZEROS)
    return grad_logits, grad_dropout if inflated else None, grad_log_theta
