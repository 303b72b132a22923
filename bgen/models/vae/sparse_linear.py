"""The product of a sparse batch with a dense weight: the first layer of an encoder over all genes.

Axes: B cells, G genes, H outputs, NNZ stored values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bgen.data.batch import CellBatch
from bgen.nn.cpu import sparse
from bgen.nn.cpu.threads import parts
from bgen.nn.gpu.kernels import usable
from bgen.nn.gpu.sparse import sparse_product

SPARSE_SHARE = 0.4
"""Share of stored values up to which the product is sparse: quicker on a CPU, and less to hold on a GPU."""

_GAIN = 32
"""Multiplications that take as long as one element of :data:`bgen.nn.cpu.threads.WORTH`."""

_PER_LOGARITHM = 2
"""Elements of :data:`bgen.nn.cpu.threads.WORTH` that take as long as one logarithm."""


def densify(rows: Tensor, indices: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Dense ``[B, G]`` with ``values [NNZ]`` at ``(rows, indices)``; zero elsewhere."""
    dense = values.new_zeros(shape[0] * shape[1])
    return dense.scatter_(0, rows * shape[1] + indices, values).view(shape)


class _SparseMatmul(torch.autograd.Function):
    """``X @ W`` for CSR ``X [B, G]`` and ``W [G, H]``, all float32 on a CPU; gradient for ``W`` only."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, indptr: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(indptr, indices, values)
        ctx.n_genes = len(weight)
        return _product(indptr, indices, values, weight.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        indptr, indices, values = ctx.saved_tensors
        number = parts(ctx.n_genes, len(values))
        by_gene = sparse.transpose(indptr.numpy(), indices.numpy(), values.numpy(), ctx.n_genes, number)
        indptr, indices, values = (torch.from_numpy(array) for array in by_gene)
        return _product(indptr, indices, values, grad.contiguous()), None, None, None


def _product(indptr: Tensor, indices: Tensor, values: Tensor, dense: Tensor) -> Tensor:
    out = torch.empty(len(indptr) - 1, dense.shape[1])
    number = parts(len(out), len(values) * dense.shape[1] // _GAIN)
    sparse.product(indptr.numpy(), indices.numpy(), values.numpy(), dense.numpy(), number, out.numpy())
    return out


def log_normalise(batch: CellBatch, counts: Tensor, scale: float) -> Tensor:
    """``log(1 + scale * count / library)`` of ``counts [NNZ]`` of the cells of ``batch``; a library is at least 1."""
    if counts.device.type == "cpu" and counts.dtype == torch.float32:
        out = torch.empty_like(counts)
        number = parts(len(batch), _PER_LOGARITHM * len(counts))
        sparse.log_normalise(batch.indptr.numpy(), counts.numpy(), scale, number, out.numpy())
        return out
    return torch.log1p(counts * _factor(batch, counts, scale).index_select(0, batch.rows))


def _factor(batch: CellBatch, counts: Tensor, scale: float) -> Tensor:
    """Scale over library of each cell, ``[B]``."""
    return scale / torch.segment_reduce(counts, "sum", offsets=batch.indptr, initial=0.0).clamp_min(1.0)


def sparse_matmul(weight: Tensor, batch: CellBatch, values: Tensor) -> Tensor:
    """``X @ W``, ``[B, H]``: ``X [B, G]`` has ``values [NNZ]`` where ``batch`` has its counts; ``weight [G, H]``.

    Sparse where fewer than two in five values are stored, and dense elsewhere. On a GPU the sparse product, too, is one
    of dense tiles on tensor cores (:mod:`bgen.nn.gpu.sparse`), because gathering rows of the weight costs more.

    Forward and backward pass were measured on one thread, in milliseconds: this one, densifying and multiplying, and
    MKL's sparse product. B = 1,024, G = 2,000, H = 128: 3.6, 13, 7.6 at 10 % non-zeros, 12, 16, 23 at 24 %, 19, 16, 38
    at 50 %. B = 256, G = 16,791: 6.8, 32, 14 at 5 %. B = 512, G = 20,000, H = 1,024: 313, 475, 896 at 10 %.
    """
    sparse_enough = _sparse_enough(weight, batch)
    if sparse_enough and usable(weight):
        return sparse_product(weight, batch.indptr, batch.indices, values)
    if weight.device.type == "cpu" and weight.dtype == values.dtype == torch.float32 and sparse_enough:
        return _SparseMatmul.apply(weight, batch.indptr, batch.indices, values)
    return densify(batch.rows, batch.indices, values, (len(batch), len(weight))) @ weight


def log_normalised_matmul(weight: Tensor, batch: CellBatch, counts: Tensor, scale: float) -> Tensor:
    """:func:`sparse_matmul` of :func:`log_normalise`, of which a GPU's kernel does not store the logarithms."""
    if _sparse_enough(weight, batch) and usable(weight):
        return sparse_product(weight, batch.indptr, batch.indices, counts, _factor(batch, counts, scale))
    return sparse_matmul(weight, batch, log_normalise(batch, counts, scale))


def _sparse_enough(weight: Tensor, batch: CellBatch) -> bool:
    return len(batch.indices) < SPARSE_SHARE * len(batch) * len(weight)
