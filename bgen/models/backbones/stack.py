"""The velocity network that mixes: layers of blocks along the axes that its pattern names.

Axes: B trajectories, T time points, N cells per time point, D latent size, O output size, C width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bgen.config.backbone import BackboneConfig
from bgen.models.backbones.backbone import Backbone
from bgen.models.backbones.block import Block
from bgen.models.backbones.grid import Grid
from bgen.nn.embedding import TimeEmbedding
from bgen.nn.flops import layers
from bgen.nn.points import check_ascending, check_regular


class Stack(Backbone):
    """``[B, T, N, D]`` to ``[B, T, N, O]``: transformer, set_transformer, ssm or hybrid, as the pattern has it.

    Permuting the cells of one time point permutes that time point's output and changes nothing else (where cells are
    tracked: permuting them alike at all time points). Cells that do not exist influence nothing.

    Parameters
    ----------
    size
        D.
    config
        Everything else; ``width`` is C.
    outputs
        O.
    """

    def __init__(self, size: int, config: BackboneConfig, outputs: int) -> None:
        super().__init__()
        self.config = config
        self.flow_time = TimeEmbedding(config.width)
        self.stem = nn.Linear(size, config.width)
        self.blocks = nn.ModuleList(Block(axis, config) for _ in range(config.layers) for axis in config.axes)
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, outputs)
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
        """See :class:`Backbone`; the result is zero at cells that do not exist.

        Raises
        ------
        UserError
            As :meth:`check_times`, where the times are on the CPU.
        """
        B, T, N, _ = z.shape
        if time is not None and time.device.type == "cpu":
            self.check_times(mask, time)
        grid = Grid((B, T, N), mask, None if time is None else time / self.config.time.scale)
        condition = condition + self.flow_time(t)
        x = through(self.blocks, self.stem(grid.blank(z)), condition, grid, self.config.recompute)
        return grid.blank(self.head(self.norm(x)))

    def check_times(self, mask: Tensor | None, time: Tensor) -> None:
        """See :class:`Backbone`: times must ascend, and some mixers need a regular grid."""
        check_times(self, self.config, mask, time)

    def flops(self, B: int, T: int, N: int) -> int:
        """See :class:`Backbone`."""
        blocks = sum(block.flops(B, T, N) for block in cast("Iterable[Block]", self.blocks))
        return layers(B * T * N, self.stem, self.head) + self.flow_time.flops(B * T) + blocks


def through(blocks: nn.ModuleList, x: Tensor, condition: Tensor, grid: Grid, recompute: bool) -> Tensor:
    """Pass ``x [B, T, N, C]`` through the blocks under a ``condition [B, T, C]``."""
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, condition, grid, use_reentrant=False)
        else:
            x = block(x, condition, grid)
    return x


def check_times(backbone: nn.Module, config: BackboneConfig, mask: Tensor | None, time: Tensor) -> None:
    """Raise UserError if the times ``[B, T]`` do not suit what mixes along them."""
    if "time" not in config.axes:
        return
    points = Grid((*time.shape, 0), mask, time / config.time.scale).populations
    if any(getattr(module, "needs_regular_grid", False) for module in backbone.modules()):
        check_regular(points, config.time.mixer)
    else:
        check_ascending(points)
