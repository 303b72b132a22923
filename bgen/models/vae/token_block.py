"""A block of attention among the tokens of a cell.

What is known of how tokens relate to one another raises the logits of attention, by a learned gate for each kind of
relation and each head.

Axes: B cells, M tokens, D width, H heads, R kinds of relations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bgen.config.backbone import AttentionConfig
from bgen.nn.flops import layers
from bgen.nn.mixers.attention import Attention
from bgen.nn.residual import keyed_dropout

FIRST_DROPOUT = 1 << 12
"""Number of the first dropout layer of token blocks: all others of a VAE have small ones."""

_EXPANSION = 2
"""Width of the hidden layer over that of a token."""


class TokenBlock(nn.Module):
    """Attention among the tokens of a cell, then a feed-forward layer to each: ``[B, M, D]``.

    Parameters
    ----------
    width, heads
        D, H.
    dropout
        Probability that a hidden unit is dropped in training.
    number
        Number of this dropout layer in the model.
    relations
        R.
    recompute
        Activation checkpointing: keep only the input, and compute the rest again in the backward pass.
    """

    decayed = ()

    def __init__(
        self, width: int, heads: int, dropout: float, number: int, relations: int = 0, recompute: bool = False
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, AttentionConfig(heads=heads))
        self.inner_norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, _EXPANSION * width)
        self.outer = nn.Linear(_EXPANSION * width, width)
        self.gate = nn.Parameter(torch.ones(relations, heads)) if relations else None
        self.dropout = dropout
        self.number = number
        self.recompute = recompute

    def forward(self, x: Tensor, keys: Tensor, relations: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """Apply the block.

        Parameters
        ----------
        keys
            ``[B]``: dropout is drawn from them.
        relations
            ``[R, M, M]``, of rows to columns.
        valid
            bool ``[B, M]``: tokens that others see, at least one a cell; None: all. Not together with relations.
        """
        if self.recompute and torch.is_grad_enabled():
            # Nothing here draws from a generator, so there is no state to keep for the second time.
            given = x, keys, relations, valid
            again: Tensor = checkpoint(self._apply_to, *given, use_reentrant=False, preserve_rng_state=False)
            return again
        return self._apply_to(x, keys, relations, valid)

    def _apply_to(self, x: Tensor, keys: Tensor, relations: Tensor | None, valid: Tensor | None) -> Tensor:
        normed = self.norm(x)
        q, k, v = self.attention.project(normed, normed)
        bias = None if valid is None else valid[:, None, None]
        if self.gate is not None and relations is not None:
            bias = torch.einsum("rh,rij->hij", self.gate, relations).to(q.dtype)
        x = x + self.attention.combine(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
        hidden = F.silu(self.inner(self.inner_norm(x)))
        if self.training and self.dropout > 0:
            hidden = keyed_dropout(hidden.flatten(1), keys, self.number, self.dropout).view(hidden.shape)
        return x + self.outer(hidden)

    def flops(self, B: int, M: int) -> int:
        """Floating-point operations of the forward pass."""
        bias = 0 if self.gate is None else 2 * self.gate.numel() * M * M
        return bias + self.attention.flops(B, M, M) + layers(B * M, self.inner, self.outer)
