"""The product of sparse counts with a dense weight on GPUs as one operator, without the dense counts.

It serves the first layer of an encoder over all genes, which takes logarithms of normalised counts, and what tokens
read of a set of genes. Plain forms are in :mod:`bgen.models.vae.sparse_linear`.

At B = 4,096 cells of 2,000 of G = 20,000 genes, and H = 1,024 in bfloat16, a pass reads entries (66 MB), starts of
tiles (twice 10 MB) and weight or gradient, and writes the other: 140 MB, 42 us on an H100 at 3.35 TB/s, 29 us on an
H200 at 4.8 TB/s. torch's operators move 1.1 GB, 0.34 and 0.24 ms, and keep 164 MB of dense counts for the backward
pass. The product itself is the dense one, 168 GFLOP in each pass, 0.2 to 0.3 ms on both cards, as torch's is. Entries
become dense in registers, once for every 256 outputs: some 13 times 3 operations for each of a tile's cells and genes,
13 G in all, 0.4 to 0.5 ms on both, which is what a pass is expected to take. So it saves memory, and no time, where
counts are as dense as this, and saves time where they are sparser: the operations are in proportion to the fullest cell
of a tile. Never measured: no GPU has run it. It is tested through Triton's interpreter.

Axes: B cells, G genes, H outputs, NNZ stored values.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bgen.nn.precision import as_autocast_says

_ENTRIES = "Tensor indptr, Tensor indices, Tensor values, Tensor? factor"


@cache
def _kernels() -> Any:
    return importlib.import_module("bgen.nn.gpu.sparse_triton")


@torch.library.custom_op("bgen::sparse_product", mutates_args=(), schema=f"(Tensor weight, {_ENTRIES}) -> Tensor")
def _product(weight, indptr, indices, values, factor):  # type: ignore[no-untyped-def]
    starts = _kernels().starts(indptr, indices, len(weight))
    return _kernels().product(weight, starts, indices, values, factor)


@_product.register_fake
def _(weight, indptr, indices, values, factor):  # type: ignore[no-untyped-def]
    return weight.new_empty(len(indptr) - 1, weight.shape[1])


@torch.library.custom_op(
    "bgen::sparse_product_gradient", mutates_args=(), schema=f"(Tensor grad, {_ENTRIES}, SymInt n_genes) -> Tensor"
)
def _gradient(grad, indptr, indices, values, factor, n_genes):  # type: ignore[no-untyped-def]
    starts = _kernels().starts(indptr, indices, n_genes)
    return _kernels().gradient(grad, starts, indices, values, factor, n_genes)


@_gradient.register_fake
def _(grad, indptr, indices, values, factor, n_genes):  # type: ignore[no-untyped-def]
    return grad.new_empty(n_genes, grad.shape[1])


class _SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, *entries: Tensor | None) -> Tensor:
        ctx.save_for_backward(*entries)
        ctx.n_genes = len(weight)
        out: Tensor = _product(weight, *entries)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(grad.contiguous(), *ctx.saved_tensors, ctx.n_genes), None, None, None, None


def sparse_product(
    weight: Tensor, indptr: Tensor, indices: Tensor, values: Tensor, factor: Tensor | None = None
) -> Tensor:
    """Return ``X @ W``, ``[B, H]``, as a dense product would: under autocast in its precision. Gradient for W only.

    Parameters
    ----------
    weight
        W, ``[G, H]``.
    indptr, indices, values
        X, ``[B, G]``, as CSR; ``indices`` int32 that ascend within a cell.
    factor
        float32 ``[B]``: values of a cell become log(1 + factor * value); None: they are as they are.
    """
    out: Tensor = _SparseProduct.apply(as_autocast_says(weight).contiguous(), indptr, indices, values.float(), factor)
    return out
