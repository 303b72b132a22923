"""Cells on a grid of trajectories, time points and cells per time point, as the flow over populations takes them.

Axes: B trajectories, T time points, N cells per time point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from bgen.data.batch import CellBatch
from bgen.order.mixing import Mixing
from bgen.order.trajectories import GridOfCells


@dataclass
class TrajectoryBatch(CellBatch):
    """B trajectories as ``B T N`` cells in that order: cell ``(b T + t) N + n`` is the n-th at time point t of b.

    A place without a cell (``mask`` False) still holds some cell, which never counts. The length of a batch is its
    number of places, so that a global batch is counted in cells whatever its shape.

    Attributes
    ----------
    mask
        bool ``[B, T, N]``: places that hold a cell; a time point without any was not observed.
    time
        float32 ``[B, T]``: when the time points are, in the store's unit, ascending along T.
    control
        bool ``[B, T]``: populations before a perturbation.
    whitened
        ``[B T N, D + 1]``: latents of the cells, if they are known; None: they are encoded from counts.
    moved
        ``[B, T, D + 1]``: what the latents of a population are moved by in training; None: nothing.
    population
        int64 ``[B, T]``: numbers of the populations, -1 where there is none; None: they have none.
    """

    mask: Tensor = field(kw_only=True)
    time: Tensor = field(kw_only=True)
    control: Tensor = field(kw_only=True)
    whitened: Tensor | None = field(kw_only=True, default=None)
    moved: Tensor | None = field(kw_only=True, default=None)
    population: Tensor | None = field(kw_only=True, default=None)

    @classmethod
    def of_grids(cls, cells: CellBatch, grids: Sequence[GridOfCells], mixing: Mixing | None = None) -> TrajectoryBatch:
        """Put ``B T N`` cells, in the order of the B ``grids``, on their places; ``mixing`` says what moves them."""
        moved = None if mixing is None else torch.from_numpy(np.stack([mixing.moved(grid) for grid in grids]))
        return cls.of(
            cells,
            mask=torch.from_numpy(np.stack([grid.mask for grid in grids])),
            time=torch.from_numpy(np.stack([grid.time for grid in grids])),
            control=torch.from_numpy(np.stack([grid.control for grid in grids])),
            moved=moved,
            population=torch.from_numpy(np.stack([grid.population for grid in grids])),
        )

    @classmethod
    def of(
        cls,
        cells: CellBatch,
        mask: Tensor,
        time: Tensor,
        control: Tensor,
        moved: Tensor | None = None,
        population: Tensor | None = None,
    ) -> TrajectoryBatch:
        """Put ``B T N`` cells on the grid of ``mask``."""
        assert len(cells) == mask.numel(), "a cell for every place"
        of_cells = {f.name: getattr(cells, f.name) for f in fields(cells)}
        return cls(**of_cells, mask=mask, time=time, control=control, moved=moved, population=population)

    @property
    def exists(self) -> Tensor:
        """bool ``[B, T]``: time points with at least one cell."""
        return self.mask.any(-1)

    def population_obs(self) -> dict[str, Tensor]:
        """Columns per population, ``[B T]``: the value that all its cells share; unknown (-1, NaN) if they differ."""
        mask = self.mask.flatten(0, 1)
        first = mask.int().argmax(dim=1, keepdim=True)
        shared = {}
        for name, column in self.obs.items():
            value_PN = column.view(mask.shape)
            value_P1 = value_PN.gather(1, first)
            same = ((value_PN == value_P1) | ~mask).all(1) & mask.any(1)
            unknown = torch.nan if column.is_floating_point() else -1
            shared[name] = torch.where(same, value_P1.squeeze(1), unknown)
        return shared
