"""The identity encoder: cells whose latents are given, not encoded from counts.

Axes: n cells of the table, B cells of a batch, D dimensions that flow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.data.trajectory_batch import TrajectoryBatch
from bgen.models.vae.vae import VAE
from bgen.order.trajectories import GridOfCells


class MeasuredLatents(VAE):
    """Stands where a trained VAE stands, and looks the latents up by the cells' numbers.

    For measurements that are continuous already (principal components, protein levels, published benchmarks): the
    flow, its patterns and its backbones are then the same code as for counts. The last dimension takes the place of the
    log library size.

    Parameters
    ----------
    table
        float32 ``[n, D]``, whitened.
    """

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__(VAEConfig(latent=table.shape[1] - 1, hidden=1, blocks=0), 1, {})
        self.register_buffer("table", table)

    def latents(self, batch: CellBatch) -> Tensor:
        """Return the latents ``[B, D]`` of the cells."""
        return self.table[batch.cells]


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
