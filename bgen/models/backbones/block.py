"""The residual block of every backbone: one mixer along one axis, under AdaLN-zero modulation.

Axes: B trajectories, T time points, N cells per time point, D width, also of the condition.
"""

from __future__ import annotations

from torch import Tensor, nn

from bgen.config.backbone import Axis, BackboneConfig
from bgen.models.backbones.along import mixer_along
from bgen.models.backbones.grid import Grid
from bgen.nn.modulation import AdaLNZero


class Block(nn.Module):
    """x + gate(c) * mixer(LayerNorm(x) * (1 + scale(c)) + shift(c)), c per time point. It starts as the identity."""

    def __init__(self, axis: Axis, config: BackboneConfig) -> None:
        super().__init__()
        self.modulation = AdaLNZero(config.width, config.width)
        self.mixer = mixer_along(axis, config)

    def forward(self, x_BTND: Tensor, condition_BTD: Tensor, grid: Grid) -> Tensor:
        """Apply the block."""
        y_BTND, gate_BT1D = self.modulation(x_BTND, condition_BTD)
        return x_BTND + gate_BT1D * self.mixer(y_BTND, grid)

    def flops(self, B: int, T: int, N: int) -> int:
        """Floating-point operations of the forward pass; see :mod:`bgen.nn.flops` for what is counted."""
        return self.modulation.flops(B * T) + self.mixer.flops(B, T, N)
