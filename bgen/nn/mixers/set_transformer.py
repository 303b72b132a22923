"""Set Transformer blocks: attention among N cells through a few learned points, at a cost that grows with N.

    pool:     PMA(X) = attention of learned seeds to X
    mix:      ISAB(X) = attention of X to attention of learned points to X
Source: Lee et al., "Set Transformer", ICML 2019. The blocks here are bare attentions; residuals, normalisation and
feed-forward layers are the backbone's.

Axes: B populations, N cells, D width, M learned points.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bgen.config.backbone import AttentionConfig
from bgen.nn.mixers.attention import Attention
from bgen.nn.mixers.mixer import Mixer
from bgen.nn.points import Points


class AttentionPool(nn.Module):
    """Pool populations into M tokens by attention with learned queries (PMA): ``[B, N, D]`` to ``[B, M, D]``."""

    decayed = ()

    def __init__(self, width: int, tokens: int, config: AttentionConfig) -> None:
        super().__init__()
        self.seed_embedding = nn.Parameter(torch.randn(tokens, width))
        self.attention = Attention(width, config)

    def forward(self, x_BND: Tensor, valid_BN: Tensor | None = None) -> Tensor:
        """Pool the cells that exist; an empty population pools to zeros."""
        return self.attention(self.seed_embedding.to(x_BND.dtype).expand(len(x_BND), -1, -1), x_BND, valid_BN)

    def flops(self, B: int, N: int) -> int:
        """Floating-point operations of the forward pass; see :mod:`bgen.nn.flops` for what is counted."""
        return self.attention.flops(B, len(self.seed_embedding), N)


class SetAttention(Mixer):
    """Mix ``[B, N, D]`` along N through inducing points (ISAB)."""

    def __init__(self, width: int, inducing: int, config: AttentionConfig) -> None:
        super().__init__()
        self.pool = AttentionPool(width, inducing, config)
        self.norm = nn.LayerNorm(width)
        self.read = Attention(width, config)

    def forward(self, x_BND: Tensor, points: Points) -> Tensor:
        """Mix; what the result holds at cells that do not exist has no meaning."""
        x_BND = points.blank(x_BND)
        return self.read(x_BND, self.norm(self.pool(x_BND, points.valid_BL)))

    def flops(self, B: int, L: int) -> int:
        """See :class:`Mixer`."""
        return self.pool.flops(B, L) + self.read.flops(B, L, len(self.pool.seed_embedding))
