"""The mixers by name, and how one of them is laid along an axis of the grid.

A mixer of points has ``forward(x [B, L, D], points) -> [B, L, D]``; a mixer of the grid, as a block holds it, has
``forward(x [B, T, N, D], grid) -> [B, T, N, D]``. A new mixer is one class in ``bgen/nn`` and one line here.

Axes: B trajectories, T time points, N cells per time point, D width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from bgen.config.backbone import Axis, BackboneConfig
from bgen.models.backbones.grid import Grid
from bgen.nn.mixers.attention import CellAttention, TimeAttention
from bgen.nn.mixers.hyena import Hyena
from bgen.nn.mixers.mamba1 import Mamba1
from bgen.nn.mixers.mamba2 import Mamba2
from bgen.nn.mixers.mlp import MLP
from bgen.nn.mixers.s4d import S4D
from bgen.nn.mixers.set_transformer import SetAttention
from bgen.nn.mixers.state_tokens import StateTokens

TIME_MIXERS: dict[str, Callable[[BackboneConfig], nn.Module]] = {
    "mamba2": lambda config: Mamba2(config.width, config.mamba2, config.time),
    "mamba1": lambda config: Mamba1(config.width, config.mamba1, config.time),
    "s4d": lambda config: S4D(config.width, config.s4d, config.time),
    "hyena": lambda config: Hyena(config.width, config.hyena, config.time),
    "attention": lambda config: TimeAttention(config.width, config.attention, config.time),
}

CELL_MIXERS: dict[str, Callable[[BackboneConfig], nn.Module]] = {
    "attention": lambda config: CellAttention(config.width, config.attention),
    "set_attention": lambda config: SetAttention(config.width, config.cells.inducing, config.attention),
}


class AlongNone(nn.Module):
    """Each cell by itself."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x_BTND: Tensor, grid: Grid) -> Tensor:
        """Apply the mixer."""
        return self.mixer(x_BTND)


class AlongCells(nn.Module):
    """The cells of each time point among themselves."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x_BTND: Tensor, grid: Grid) -> Tensor:
        """Apply the mixer."""
        return self.mixer(x_BTND.flatten(0, 1), grid.cells).view_as(x_BTND)


class AlongTimeBySlot(nn.Module):
    """Each slot over time: for tracked data, where slot n is the same cell or sample at every time point."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x_BTND: Tensor, grid: Grid) -> Tensor:
        """Apply the mixer."""
        B, T, N, D = x_BTND.shape
        line = x_BTND.transpose(1, 2).reshape(B * N, T, D)
        return self.mixer(line, grid.slots).view(B, N, T, D).transpose(1, 2)


class AlongTimeByTokens(nn.Module):
    """Populations over time, through state tokens: for data where no cell is seen twice."""

    def __init__(self, tokens: StateTokens) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, x_BTND: Tensor, grid: Grid) -> Tensor:
        """Apply the state tokens."""
        return self.tokens(grid.blank(x_BTND), grid.mask_BTN, grid.populations)


def mixer_along(axis: Axis, config: BackboneConfig) -> nn.Module:
    """Make the mixer that ``config`` names for an axis, laid along that axis."""
    if axis == "none":
        return AlongNone(MLP(config.width, config.mlp))
    if axis == "cells":
        return AlongCells(CELL_MIXERS[config.cells.mixer](config))
    mixer = TIME_MIXERS[config.time.mixer](config)
    if config.time.tracked:
        return AlongTimeBySlot(mixer)
    return AlongTimeByTokens(StateTokens(config.width, config.time.tokens, mixer, config.attention))
