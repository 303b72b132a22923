"""Triton kernels of the product of sparse counts with a dense weight, and of its gradient, on tensor cores.

A program makes a dense tile of some cells and some genes in its registers, from their entries, and multiplies it; the
dense ``[B, G]`` is nowhere. Every sum is taken by one program in one order, so that results are the same each time.

Axes: B cells, G genes, H outputs, NNZ stored values, S tiles of genes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bgen.nn.gpu.elementary_triton import log1p

CELLS = 128
"""Cells of a tile."""

GENES = 64
"""Genes of a tile."""

WIDTH = 256
"""Outputs of a tile in half precision; in float32, which tensor cores do not multiply, a quarter."""


@triton.jit
def _starts(indptr, indices, out, cells, tiles, steps, GENES: tl.constexpr, BLOCK: tl.constexpr):
    """A cell: where its entries of each tile of genes begin, ``[S + 1, B]``, by bisection."""
    row = tl.program_id(0)
    tile = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    low = tl.load(indptr + row) + tl.zeros([BLOCK], tl.int64)
    high = tl.load(indptr + row + 1) + tl.zeros([BLOCK], tl.int64)
    for _ in range(steps):
        going = low < high
        middle = (low + high) // 2
        right = going & (tl.load(indices + middle, going, 0) < tile * GENES)
        high = tl.where(going & (right == 0), middle, high)
        low = tl.where(right, middle + 1, low)
    tl.store(out + tile.to(tl.int64) * cells + row, low, tile <= tiles)


@triton.jit
def _tile(
    starts, indices, values, factor, cell, tile, cells,
    SCALED: tl.constexpr, CELLS: tl.constexpr, GENES: tl.constexpr,
):  # fmt: skip
    """The dense values of some cells in a tile of genes, float32 ``[CELLS, GENES]``."""
    here = cell < cells
    start = tl.load(starts + tl.cast(tile, tl.int64) * cells + cell, here, 0)
    end = tl.load(starts + (tl.cast(tile, tl.int64) + 1) * cells + cell, here, 0)
    lane = tl.arange(0, GENES) + tile * GENES
    if SCALED:
        scale = tl.load(factor + cell, here, 0.0)
    dense = tl.zeros([CELLS, GENES], tl.float32)
    for slot in range(tl.max(end - start, 0)):
        place = start + slot
        has = place < end
        value = tl.load(values + place, has, 0.0)
        if SCALED:
            value = log1p(value * scale)
        gene = tl.load(indices + place, has, -1)
        dense += tl.where(gene[:, None] == lane[None, :], value[:, None], 0.0)
    return dense


@triton.jit
def _product(
    weight, starts, indices, values, factor, out, cells, genes, width, tiles,
    SCALED: tl.constexpr, CELLS: tl.constexpr, GENES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some cells and some outputs, over all genes."""
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    output = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([CELLS, WIDTH], tl.float32)
    for tile in range(tiles):
        dense = _tile(starts, indices, values, factor, cell, tile, cells, SCALED, CELLS, GENES)
        gene = tile * GENES + tl.arange(0, GENES)
        inside = (gene < genes)[:, None] & (output < width)[None, :]
        of_genes = tl.load(weight + gene.to(tl.int64)[:, None] * width + output[None, :], inside, 0.0)
        total = tl.dot(dense.to(of_genes.dtype), of_genes, total, input_precision="ieee")
    place = cell.to(tl.int64)[:, None] * width + output[None, :]
    inside = (cell < cells)[:, None] & (output < width)[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), inside)


@triton.jit
def _gradient(
    grad, starts, indices, values, factor, out, cells, genes, width,
    SCALED: tl.constexpr, CELLS: tl.constexpr, GENES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of genes and some outputs, over all cells."""
    tile = tl.program_id(0)
    gene = tile * GENES + tl.arange(0, GENES)
    output = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([GENES, WIDTH], tl.float32)
    for first in range(0, cells, CELLS):
        cell = first + tl.arange(0, CELLS)
        dense = _tile(starts, indices, values, factor, cell, tile, cells, SCALED, CELLS, GENES)
        inside = (cell < cells)[:, None] & (output < width)[None, :]
        of_cells = tl.load(grad + cell.to(tl.int64)[:, None] * width + output[None, :], inside, 0.0)
        total = tl.dot(tl.trans(dense.to(of_cells.dtype)), of_cells, total, input_precision="ieee")
    place = gene.to(tl.int64)[:, None] * width + output[None, :]
    inside = (gene < genes)[:, None] & (output < width)[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), inside)


def starts(indptr: Tensor, indices: Tensor, n_genes: int) -> Tensor:
    """Return int64 ``[S + 1, B]``: where the entries of each cell in each tile of genes begin, and where they end.

    ``indices`` ascend within a cell.
    """
    cells, tiles = len(indptr) - 1, triton.cdiv(n_genes, GENES)
    out = torch.empty(tiles + 1, cells, dtype=torch.int64, device=indptr.device)
    grid = cells, triton.cdiv(tiles + 1, 128)
    _starts[grid](indptr, indices, out, cells, tiles, n_genes.bit_length() + 1, GENES=GENES, BLOCK=128)
    return out


def product(weight: Tensor, starts: Tensor, indices: Tensor, values: Tensor, factor: Tensor | None) -> Tensor:
    """Return ``X @ W``, ``[B, H]``, in the dtype of ``weight [G, H]``, which is contiguous.

    Parameters
    ----------
    starts, indices, values
        The entries of X: :func:`starts`, and their genes int32 and values float32, ``[NNZ]``.
    factor
        float32 ``[B]``: values of a cell become log(1 + factor * value); None: they are as they are.
    """
    out = weight.new_empty(starts.shape[1], weight.shape[1])
    options = _options(weight.dtype, factor)
    grid = triton.cdiv(len(out), CELLS), triton.cdiv(out.shape[1], options["WIDTH"])
    entries = starts, indices, values, values if factor is None else factor
    _product[grid](weight, *entries, out, len(out), *weight.shape, len(starts) - 1, **options)
    return out


def gradient(
    grad: Tensor, starts: Tensor, indices: Tensor, values: Tensor, factor: Tensor | None, n_genes: int
) -> Tensor:
    """Return ``X^T @ grad``, ``[G, H]``, in the dtype of ``grad [B, H]``, which is contiguous."""
    out = grad.new_empty(n_genes, grad.shape[1])
    options = _options(grad.dtype, factor)
    grid = triton.cdiv(n_genes, GENES), triton.cdiv(out.shape[1], options["WIDTH"])
    entries = starts, indices, values, values if factor is None else factor
    _gradient[grid](grad, *entries, out, len(grad), *out.shape, **options)
    return out


def _options(dtype: torch.dtype, factor: Tensor | None) -> dict[str, Any]:
    width = WIDTH // 4 if dtype == torch.float32 else WIDTH
    return {"SCALED": factor is not None, "CELLS": CELLS, "GENES": GENES, "WIDTH": width, "num_warps": 8}
