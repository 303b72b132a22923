"""Residual feed-forward block whose dropout is keyed per cell.

torch's dropout draws from a generator, so the mask of a cell would depend on the cells before it, and so on the number
of ranks. Here the mask comes from the cell's key (:mod:`bgen.nn.random`).

Axes: B cells, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bgen.nn.gpu.dropout import dropout
from bgen.nn.random import Stream


def keyed_dropout(x: Tensor, keys: Tensor, number: int, probability: float) -> Tensor:
    """Dropout of ``x [B, D]`` with a mask that depends on ``keys [B]`` and on the layer's ``number`` alone."""
    return dropout(x, keys, Stream.DROPOUT + number, 1.0 - probability)


class ResidualBlock(nn.Module):
    """``x + W2 dropout(silu(W1 LayerNorm(x)))`` for ``x [B, D]``.

    Parameters
    ----------
    width
        D.
    dropout
        Probability that a hidden unit is dropped in training.
    number
        Number of this dropout layer in the model; layers of one model take different numbers.
    recompute
        Activation checkpointing: keep only the input, and compute the rest again in the backward pass.
    """

    def __init__(self, width: int, dropout: float, number: int, recompute: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        self.dropout = dropout
        self.number = number
        self.recompute = recompute

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Apply the block; ``keys`` int64 ``[B]`` are needed in training with dropout."""
        if self.recompute and torch.is_grad_enabled():
            # Nothing here draws from a generator, so there is no state to keep for the second time.
            recomputed: Tensor = checkpoint(self._apply_to, x, keys, use_reentrant=False, preserve_rng_state=False)
            return recomputed
        return self._apply_to(x, keys)

    def _apply_to(self, x: Tensor, keys: Tensor | None) -> Tensor:
        hidden = F.silu(self.inner(self.norm(x)))
        if self.training and self.dropout > 0:
            assert keys is not None, "dropout in training needs the cells' keys"
            hidden = keyed_dropout(hidden, keys, self.number, self.dropout)
        return x + self.outer(hidden)
