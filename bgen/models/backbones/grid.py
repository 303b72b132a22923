"""The grid of time points and cells: which cells exist, when the time points are, and what a mixer is told about it.

Axes: B trajectories, T time points, N cells per time point, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bgen.nn.points import Points


@dataclass(frozen=True)
class Grid:
    """Axes of one batch.

    Attributes
    ----------
    shape
        B, T, N.
    mask_BTN
        bool: cells that exist. None: all.
    time_BT
        Times in units of the configured scale. None: one unit apart.
    """

    shape: tuple[int, int, int]
    mask_BTN: Tensor | None = None
    time_BT: Tensor | None = None

    def blank(self, x_BTND: Tensor) -> Tensor:
        """Set cells that do not exist to zero, whatever stands there, be it NaN."""
        if self.mask_BTN is None:
            return x_BTND
        return torch.where(self.mask_BTN[..., None], x_BTND, x_BTND.new_zeros(()))

    @cached_property
    def populations(self) -> Points:
        """The time points, ``[B, T]``: one without a single cell was not observed."""
        return Points(None if self.mask_BTN is None else self.mask_BTN.any(-1), self.time_BT)

    @cached_property
    def slots(self) -> Points:
        """The time points of every slot by itself, ``[B N, T]``."""
        N = self.shape[2]
        valid = None if self.mask_BTN is None else self.mask_BTN.transpose(1, 2).flatten(0, 1)
        return Points(valid, None if self.time_BT is None else self.time_BT.repeat_interleave(N, dim=0))

    @cached_property
    def cells(self) -> Points:
        """The cells of every time point by itself, ``[B T, N]``, without order."""
        return Points(None if self.mask_BTN is None else self.mask_BTN.flatten(0, 1))
