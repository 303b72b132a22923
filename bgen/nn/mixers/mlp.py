"""The mixer along no axis: a network of two layers on each point by itself."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bgen.config.backbone import MLPConfig
from bgen.nn.flops import layers


class MLP(nn.Module):
    """W_2 gelu(W_1 x) for ``x [..., D]``."""

    def __init__(self, width: int, config: MLPConfig) -> None:
        super().__init__()
        self.inner = nn.Linear(width, config.expand * width)
        self.outer = nn.Linear(config.expand * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every point."""
        return self.outer(F.gelu(self.inner(x)))

    def flops(self, points: int) -> int:
        """Floating-point operations of the forward pass; see :mod:`bgen.nn.flops` for what is counted."""
        return layers(points, self)
