"""Velocity network without mixing: every cell by itself, through residual blocks modulated by AdaLN-zero.

Axes: B trajectories, T time points, N cells per time point, D latent size, O output size, C width of the condition
and the blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from bgen.models.backbones.backbone import Backbone
from bgen.nn.embedding import TimeEmbedding
from bgen.nn.flops import layers
from bgen.nn.modulation import AdaLNZero


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = AdaLNZero(width, width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        y, gate = self.modulation(x, condition)
        return x + gate * self.outer(F.silu(self.inner(y)))

    def flops(self, points: int, conditions: int) -> int:
        """Floating-point operations of the forward pass on so many points under so many conditions."""
        return self.modulation.flops(conditions) + layers(points, self.inner, self.outer)


class MLPBackbone(Backbone):
    """``[B, T, N, D]`` to ``[B, T, N, O]``, cell by cell.

    Parameters
    ----------
    size
        D, with the library size counted in.
    width
        Width of the blocks, and C.
    blocks
        Number of residual blocks.
    outputs
        O.
    """

    def __init__(self, size: int, width: int, blocks: int, outputs: int) -> None:
        super().__init__()
        self.time = TimeEmbedding(width)
        self.stem = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, outputs)
        # Zero at the start: the first losses are those of predicting nothing, and no direction is preferred.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        condition: Tensor,
        mask: Tensor | None = None,
        time: Tensor | None = None,
    ) -> Tensor:
        """See :class:`Backbone`. Cells do not see each other, so ``mask`` and ``time`` change no cell's output."""
        condition = condition + self.time(t)
        x = self.stem(z)
        for block in self.blocks:
            x = block(x, condition)
        # No normalisation before the head: the target is linear in z, and the residual stream carries z.
        return self.head(x)

    def flops(self, B: int, T: int, N: int) -> int:
        """See :class:`Backbone`."""
        blocks = sum(block.flops(B * T * N, B * T) for block in cast("Iterable[_Block]", self.blocks))
        return layers(B * T * N, self.stem, self.head) + self.time.flops(B * T) + blocks
