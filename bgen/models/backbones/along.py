"""How a mixer of points is laid along an axis of the grid.

Axes: B trajectories, T time points, N cells per time point, K tokens per cell, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from bgen.config.backbone import Axis, BackboneConfig
from bgen.models.backbones.grid import Grid
from bgen.nn.mixers.attention import CellAttention
from bgen.nn.mixers.mixer import Mixer
from bgen.nn.mixers.mlp import MLP
from bgen.nn.mixers.registry import CELL_MIXERS, TIME_MIXERS
from bgen.nn.mixers.state_tokens import StateTokens
from bgen.nn.points import Points


class Along(nn.Module, ABC):
    """A mixer of the grid, as a block holds it."""

    @abstractmethod
    def forward(self, x_BTND: Tensor, grid: Grid) -> Tensor:
        """Return ``[B, T, N, D]``; what it holds at cells that do not exist has no meaning."""

    @abstractmethod
    def flops(self, B: int, T: int, N: int) -> int:
        """Floating-point operations of the forward pass; see :mod:`bgen.nn.flops` for what is counted."""


class AlongNone(Along):
    """Each cell by itself."""

    def __init__(self, mixer: MLP) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x_BTND: Tensor, grid: Grid) -> Tensor:
        """Apply the mixer."""
        return self.mixer(x_BTND)

    def flops(self, B: int, T: int, N: int) -> int:
        """See :class:`Along`."""
        return self.mixer.flops(B * T * N)


class AlongCells(Along):
    """The cells of each time point among themselves."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x_BTND: Tensor, grid: Grid) -> Tensor:
        """Apply the mixer."""
        return self.mixer(x_BTND.flatten(0, 1), grid.cells).view_as(x_BTND)

    def flops(self, B: int, T: int, N: int) -> int:
        """See :class:`Along`."""
        return self.mixer.flops(B * T, N)


class AlongTokens(Along):
    """The tokens of each cell among themselves; they stand along B, those of a trajectory side by side."""

    def __init__(self, mixer: Mixer, tokens: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.tokens = tokens

    def forward(self, x_BTND: Tensor, grid: Grid) -> Tensor:
        """Apply the mixer; B is that of trajectories times K."""
        x_BTNKD = x_BTND.unflatten(0, (-1, self.tokens)).permute(0, 2, 3, 1, 4)
        y = self.mixer(x_BTNKD.flatten(0, 2), Points()).view(x_BTNKD.shape)
        return y.permute(0, 3, 1, 2, 4).reshape(x_BTND.shape)

    def flops(self, B: int, T: int, N: int) -> int:
        """See :class:`Along`."""
        return self.mixer.flops(B // self.tokens * T * N, self.tokens)


class AlongTimeBySlot(Along):
    """Each slot over time: for tracked data, where slot n is the same cell or sample at every time point."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x_BTND: Tensor, grid: Grid) -> Tensor:
        """Apply the mixer."""
        B, T, N, D = x_BTND.shape
        line = x_BTND.transpose(1, 2).reshape(B * N, T, D)
        return self.mixer(line, grid.slots).view(B, N, T, D).transpose(1, 2)

    def flops(self, B: int, T: int, N: int) -> int:
        """See :class:`Along`."""
        return self.mixer.flops(B * N, T)


class AlongTimeByTokens(Along):
    """Populations over time, through state tokens: for data where no cell is seen twice."""

    def __init__(self, tokens: StateTokens) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, x_BTND: Tensor, grid: Grid) -> Tensor:
        """Apply the state tokens."""
        return self.tokens(grid.blank(x_BTND), grid.mask_BTN, grid.populations)

    def flops(self, B: int, T: int, N: int) -> int:
        """See :class:`Along`."""
        return self.tokens.flops(B, T, N)


def mixer_along(axis: Axis, config: BackboneConfig) -> Along:
    """Make the mixer that ``config`` names for an axis, laid along that axis."""
    if axis == "none":
        return AlongNone(MLP(config.width, config.mlp))
    if axis == "cells":
        return AlongCells(CELL_MIXERS[config.cells.mixer](config))
    if axis == "tokens":
        return AlongTokens(CellAttention(config.width, config.attention), config.tokens.count + 1)
    mixer = TIME_MIXERS[config.time.mixer](config)
    if config.time.tracked:
        return AlongTimeBySlot(mixer)
    return AlongTimeByTokens(StateTokens(config.width, config.time.tokens, mixer, config.attention))
