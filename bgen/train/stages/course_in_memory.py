"""Training on the time course of cells in memory: what ``bgen finetune --task time`` runs on.

Axes: B trajectories, T time points, N cells per time point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bgen.config.data import TrajectoriesConfig
from bgen.config.run import RunConfig
from bgen.data.batch import CellBatch
from bgen.data.cells_in_memory import MemoryCells
from bgen.data.trajectory_batch import TrajectoryBatch
from bgen.distributed.world import World
from bgen.models.generators.latent_flow import LatentFlow
from bgen.order.keys import hash_keys
from bgen.order.trajectories import GridOfCells, Trajectories, TrajectoryOrder
from bgen.train.engine.deepspeed_json import batch_plan
from bgen.train.stages.in_memory import MemoryStage


class CourseStage(MemoryStage):
    """Trains a :class:`LatentFlow` on trajectories of populations; see :class:`MemoryStage` for the other parameters.

    Parameters
    ----------
    shape
        Time points and cells of a trajectory.
    system
        int64 ``[n_cells]``: number of the system that each cell belongs to.
    time
        ``[n_cells]``.
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
        super().__init__(config, module, cells, train, valid, world, fingerprint)
        self.shape = shape
        self.orders = {
            name: TrajectoryOrder(
                Trajectories.over_time(rows, [system[rows]], time[rows], np.zeros(len(rows), bool)),
                batch=config.train.global_batch // shape.size,
                times=shape.times,
                cells=shape.cells,
                seed=config.seed,
                name=name,
            )
            for name, rows in (("train", train), ("valid", valid))
        }

    def train_batches(self, start_step: int) -> Iterator[Sequence[CellBatch]]:
        """See :class:`bgen.train.stages.stage.Stage`."""
        size, order = self.shape.size, self.orders["train"]
        micro = batch_plan(self.config.train, self.world.size).micro // size
        share = order.batch // self.world.size
        begin, step = self.world.rank * share, start_step
        while True:
            yield [
                self._grids(order.read(step, first, first + micro), (self.config.seed, step), first * size, step)
                for first in range(begin, begin + share, micro)
            ]
            step += 1

    def valid_batches(self) -> Iterator[tuple[CellBatch, Tensor]]:
        """See :class:`bgen.train.stages.stage.Stage`: as many trajectories as a training step has, the same each
        time.
        """
        size, order = self.shape.size, self.orders["valid"]
        micro = batch_plan(self.config.train, self.world.size).micro // size
        share = order.batch // self.world.size
        begin = self.world.rank * share
        for first in range(begin, begin + share, micro):
            grids = order.read(0, first, first + micro)
            yield self._grids(grids, (self.config.seed + 1, 0), first * size, 0), torch.ones(micro * size)

    def _grids(self, grids: list[GridOfCells], key: tuple[int, int], slot: int, step: int) -> TrajectoryBatch:
        rows = np.stack([grid.cells for grid in grids]).ravel()
        cells = self.cells.batch(rows, hash_keys(*key, slot + np.arange(len(rows))), step, slot)
        return TrajectoryBatch.of_grids(cells, grids)
