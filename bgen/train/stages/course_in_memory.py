"""Training on the time course of cells in memory: what ``bgen finetune --task time`` runs on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bgen.arrays import I64
from bgen.config.data import TrajectoriesConfig
from bgen.config.run import RunConfig
from bgen.data.cells_in_memory import MemoryCells
from bgen.data.trajectory_batch import TrajectoryBatch
from bgen.distributed.world import World
from bgen.models.generators.latent_flow import LatentFlow
from bgen.order.keys import hash_keys
from bgen.order.trajectories import GridOfCells, Trajectories
from bgen.train.stages.trajectories_in_memory import TRAIN, VALID, MemoryTrajectoryStage


class CourseStage(MemoryTrajectoryStage):
    """Trains a :class:`LatentFlow` on trajectories over time; see :class:`MemoryTrajectoryStage` for other parameters.

    Parameters
    ----------
    system
        int64 ``[n_cells]``: number of the system that each cell belongs to.
    time
        ``[n_cells]``.
    train, valid
        Numbers of the cells to train on and of those to watch.
    """

    def __init__(
        self,
        config: RunConfig,
        module: LatentFlow,
        cells: MemoryCells,
        shape: TrajectoriesConfig,
        system: NDArray[np.int64],
        time: NDArray[np.float64],
        train: NDArray[np.int64],
        valid: NDArray[np.int64],
        world: World,
        fingerprint: dict[str, Any],
    ) -> None:
        never = np.zeros(len(time), bool)  # a course has no control populations
        courses = {
            name: Trajectories.over_time(rows, [system[rows]], time[rows], never[rows])
            for name, rows in ((TRAIN, train), (VALID, valid))
        }
        super().__init__(config, module, cells, shape, courses[TRAIN], courses[VALID], world, fingerprint)

    def on_grids(
        self, grids: list[GridOfCells], key: tuple[int, int], slot: int, step: int, split: str
    ) -> TrajectoryBatch:
        """See :class:`MemoryTrajectoryStage`: the cells are encoded from their counts."""
        rows = np.stack([grid.cells for grid in grids]).ravel()
        cells = self.cells.batch(rows, hash_keys(*key, slot + np.arange(len(rows))), step, slot)
        return TrajectoryBatch.of_grids(cells, grids)

    def latents(self, rows: I64) -> Tensor:
        """See :class:`MemoryTrajectoryStage`."""
        batch = self.cells.batch(rows, hash_keys(self.config.seed, rows))
        return self.flow.vae.latents(batch.to(self.world.device)).cpu()
