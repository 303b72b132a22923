"""Tokens that read a set of genes by attention, at the cost of a product of a sparse matrix.

A token m attends to the expressed genes g of a cell b, whose weights w and values s depend on the count, and whose keys
and values are made from a row e_g of the gene table:

    K_gm = 2 / sqrt(P) <norm(W_k e_g), norm(q_m)>                                       for each head
    y_bm = sum_g w_bg exp(K_gm) (V_g + s_bg S_g) / sum_g w_bg exp(K_gm),   V_g = W_v e_g,  S_g = W_s e_g

So the softmax runs over the genes, each as often as its weight says. The logit depends on the gene alone: with
a = exp(K) and T = a V, tables over genes that all cells share, numerator and denominator are ``w(X) @ T`` and
``w(X) @ a``, products of the sparse ``[B, G]`` with dense tables. Nothing else is computed for each stored count, and
nothing is padded. Queries and keys have norm sqrt(P) and no learned scale, which bounds the logits by 2 sqrt(P), so
``exp`` needs no maximum to be subtracted. Where there is nothing to read, y is zero.

What is known of genes multiplies a by a factor for each gene and token: 0 keeps a gene from a token, and 1 changes
nothing. Where signs are known of the genes that a token reads, it also reads their mean.

On a GPU both products are the kernels of :mod:`bgen.nn.gpu.sparse`, whose bytes and operations are counted there. With
M = 16 and D = 64 the table has 1,024 and some columns: a read takes what a first layer of that width takes, and twice
that with values S.

Axes: B cells, G genes, NNZ stored counts, E width of a gene's row, M tokens, S of them (the last) with signs,
H heads of P channels, D = H P.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bgen.data.batch import CellBatch
from bgen.models.vae.sparse_linear import sparse_matmul
from bgen.nn.flops import layers, linear
from bgen.nn.precision import without_autocast

_EPS = 1e-2
"""Added to the mean square of a key of about 1: the key of a row of zeros is zero, and its gradient stays small."""


class SetRead(nn.Module):
    """Read sets of genes into tokens ``[B, M, H, P]``.

    Parameters
    ----------
    inputs
        E.
    tokens, width, heads
        M, D, H.
    values
        Whether there are S_g, what a gene adds in proportion to s.
    attention
        Whether there are keys and queries; without, K = 0: the weighted mean.
    """

    decayed = ()

    def __init__(self, inputs: int, tokens: int, width: int, heads: int, *, values: bool, attention: bool) -> None:
        super().__init__()
        self.shape = tokens, heads, width // heads
        self.query = nn.Parameter(torch.randn(self.shape)) if attention else None
        self.key = nn.Linear(inputs, width, bias=False) if attention else None
        self.value = nn.Linear(inputs, width, bias=False)
        self.slope = nn.Linear(inputs, width, bias=False) if values else None

    def weights(self, genes: Tensor) -> Tensor:
        """Return a = exp(K), ``[G, M, H]``, for the genes' rows ``[G, E]``."""
        M, H, P = self.shape
        if self.key is None or self.query is None:
            return genes.new_ones(len(genes), M, H)
        key_HGP = F.rms_norm(self.key(genes).unflatten(-1, (H, P)), (P,), eps=_EPS).transpose(0, 1)
        query_HPM = F.rms_norm(self.query, (P,), eps=_EPS).permute(1, 2, 0)
        return (key_HGP @ query_HPM * (2 / math.sqrt(P))).exp().permute(1, 2, 0)

    def forward(
        self,
        genes: Tensor,
        batch: CellBatch,
        weight: Tensor,
        value: Tensor,
        factor: Tensor | None = None,
        sign: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return y, ``[B, M, H, P]``, mean signs ``[B, S, H]`` and the weight that was read, ``[B, M, H]``, in float32.

        Parameters
        ----------
        genes
            The genes' rows ``[G, E]``.
        weight, value
            w and s of the stored counts, ``[NNZ]``; w is not negative, and s is used only with ``values``.
        factor
            ``[G, M]``, not negative; None: 1.
        sign
            ``[G, S]``; None: of no token.
        """
        M, H, P = self.shape
        S = 0 if sign is None else sign.shape[1]
        with without_autocast(genes):
            a_GMH = self.weights(genes)
            if factor is not None:
                a_GMH = a_GMH * factor[..., None]
            parts = [self._spread(a_GMH, self.value(genes)), a_GMH.flatten(1)]
            if sign is not None:
                parts.append((a_GMH[:, M - S :] * sign[..., None]).flatten(1))
            table = torch.cat(parts, dim=1)
            slope = None if self.slope is None else self._spread(a_GMH, self.slope(genes))
        y, total, signs = sparse_matmul(table, batch, weight).float().split((M * H * P, M * H, S * H), dim=1)
        if slope is not None:
            y = y + sparse_matmul(slope, batch, weight * value).float()
        total_BMH = total.unflatten(1, (M, H))
        some = total_BMH > 0
        scale_BMH = torch.where(some, 1 / torch.where(some, total_BMH, 1.0), 0.0)
        signs = signs.unflatten(1, (S, H)) * scale_BMH[:, M - S :]
        return y.unflatten(1, (M, H, P)) * scale_BMH[..., None], signs, total_BMH

    def flops(self, n_genes: int, nonzeros: int, signed: int = 0) -> int:
        """Floating-point operations of the forward pass over so many stored counts, the tables' with them.

        ``signed`` is S.
        """
        M, H, P = self.shape
        keys = 0 if self.query is None else linear(n_genes, 1, M * H * P)
        return layers(n_genes, self) + keys + self.sparse_flops(nonzeros, signed)

    def sparse_flops(self, nonzeros: int, signed: int = 0) -> int:
        """Those of the sparse products alone, whose counts need no gradient."""
        M, H, P = self.shape
        return linear(nonzeros, 1, M * H * (P + 1) + signed * H + (0 if self.slope is None else M * H * P))

    @staticmethod
    def _spread(a_GMH: Tensor, value_GD: Tensor) -> Tensor:
        """Return a V, ``[G, M D]``."""
        return (a_GMH[..., None] * value_GD.unflatten(1, (1, a_GMH.shape[2], -1))).flatten(1)
