"""Cells on a grid of trajectories, time points and cells per time point, as the flow over populations takes them.

Axes: B trajectories, T time points, N cells per time point.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from bgen.data.batch import CellBatch
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
    """

    mask: Tensor = field(kw_only=True)
    time: Tensor = field(kw_only=True)
    control: Tensor = field(kw_only=True)

    @classmethod
    def of(cls, cells: CellBatch, mask: Tensor, time: Tensor, control: Tensor) -> TrajectoryBatch:
        """Put ``B T N`` cells on the grid of ``mask``."""
        assert len(cells) == mask.numel(), "a cell for every place"
        return cls(**{f.name: getattr(cells, f.name) for f in fields(cells)}, mask=mask, time=time, control=control)

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


def batch_of_grids(grids: list[GridOfCells], keys: Tensor, step: int) -> TrajectoryBatch:
    """Put cells without counts on the grid of their trajectories; ``keys [B T N]`` are the cells' random keys."""
    cells = torch.stack([torch.from_numpy(grid.cells) for grid in grids])
    time = torch.stack([torch.from_numpy(grid.time) for grid in grids])
    nothing = CellBatch(
        indptr=torch.zeros(cells.numel() + 1, dtype=torch.int64),
        indices=torch.zeros(0, dtype=torch.int32),
        counts=torch.zeros(0),
        n_genes=1,
        keys=keys,
        cells=cells.flatten(),
        step=step,
        obs={"time": time[..., None].expand(cells.shape).flatten()},
    )
    return TrajectoryBatch.of(
        nothing,
        mask=torch.stack([torch.from_numpy(grid.mask) for grid in grids]),
        time=time,
        control=torch.stack([torch.from_numpy(grid.control) for grid in grids]),
    )
