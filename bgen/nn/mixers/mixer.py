"""The base of all mixers of points: a mixer mixes along one axis and tells its cost.

Axes: B sequences or populations, L points (time points, or cells of one population), D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from bgen.nn.points import Points


class Mixer(nn.Module, ABC):
    """Mixes ``[B, L, D]`` along L.

    Attributes
    ----------
    needs_regular_grid
        Whether time points must stand one unit of time apart: the mixer's weights belong to places, not to times.
    """

    needs_regular_grid: bool = False

    @abstractmethod
    def forward(self, x_BLD: Tensor, points: Points) -> Tensor:
        """Return ``[B, L, D]``; what it holds at points that do not exist has no meaning.

        Points that do not exist must influence nothing, whatever stands there (:meth:`Points.blank`).
        """

    @abstractmethod
    def flops(self, B: int, L: int) -> int:
        """Floating-point operations of the forward pass; see :mod:`bgen.nn.flops` for what is counted."""

    def lacks(self, device: torch.device) -> str | None:
        """Say what this mixer needs on a device and does not find, and what to do; None if it can compute there.

        A run asks before it starts, so that missing kernels do not show first when a job has its GPUs.
        """
        return None
