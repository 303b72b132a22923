"""What the stages that train on trajectories of cells in memory share.

Axes: B trajectories, T time points, N cells per time point.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bgen.arrays import F32, I64
from bgen.config.data import TrajectoriesConfig
from bgen.config.run import RunConfig
from bgen.data.batch import CellBatch
from bgen.data.cells_in_memory import MemoryCells
from bgen.data.trajectory_batch import TrajectoryBatch
from bgen.distributed.world import World
from bgen.flow.references import plans_of, reference_edges, require_room
from bgen.models.generators.latent_flow import LatentFlow
from bgen.order.trajectories import GridOfCells, Trajectories, TrajectoryOrder
from bgen.train.engine.deepspeed_json import batch_plan
from bgen.train.stages.in_memory import MemoryStage

TRAIN, VALID = "train", "valid"

ENCODED = 1024
"""Cells that are encoded at a time."""


class MemoryTrajectoryStage(MemoryStage, abc.ABC):
    """Trains a :class:`LatentFlow` on trajectories; see :class:`MemoryStage` for the other parameters.

    Parameters
    ----------
    shape
        Time points and cells of a trajectory.
    train, valid
        Trajectories to train on and to watch.
    """

    def __init__(
        self,
        config: RunConfig,
        module: LatentFlow,
        cells: MemoryCells,
        shape: TrajectoriesConfig,
        train: Trajectories,
        valid: Trajectories,
        world: World,
        fingerprint: dict[str, Any],
    ) -> None:
        super().__init__(config, module, cells, np.unique(train.cells), np.unique(valid.cells), world, fingerprint)
        self.shape, self.flow = shape, module
        first = {TRAIN: 0, VALID: len(train.edges) - 1}
        self.orders = {
            name: TrajectoryOrder(
                trajectories,
                batch=config.train.global_batch // shape.size,
                times=shape.times,
                cells=shape.cells,
                seed=config.seed,
                name=name,
                first_population=first[name],
            )
            for name, trajectories in ((TRAIN, train), (VALID, valid))
        }

    @property
    def unit(self) -> int:
        """See :class:`bgen.train.stages.stage.SplitsBatches`."""
        return self.shape.size

    def train_batches(self, start_step: int) -> Iterator[Sequence[CellBatch]]:
        """See :class:`bgen.train.stages.stage.Stage`; starts are planned before the first batch, if at all."""
        coupling = self.flow.config.coupling
        if coupling.cells > 0 and self.flow.plans is None:
            splits = [order.trajectories for order in self.orders.values()]
            require_room(splits, self.flow.size, coupling.cells)
            self.flow.plans = plans_of([self._references(split, coupling.cells) for split in splits], coupling)
        return self._steps(start_step)

    def _steps(self, start_step: int) -> Iterator[Sequence[CellBatch]]:
        order, step = self.orders[TRAIN], start_step
        while True:
            yield [self._read(TRAIN, first, last, step) for first, last in self._shares(order.batch)]
            step += 1

    def valid_batches(self) -> Iterator[tuple[CellBatch, Tensor]]:
        """See :class:`bgen.train.stages.stage.Stage`: the same trajectories each time."""
        for first, last in self._shares(self.watched()):
            yield self._read(VALID, first, last, 0), torch.ones((last - first) * self.shape.size)

    def watched(self) -> int:
        """Trajectories that are watched, a multiple of those of a step: as many as a step has."""
        return self.orders[VALID].batch

    @abc.abstractmethod
    def on_grids(
        self, grids: list[GridOfCells], key: tuple[int, int], slot: int, step: int, split: str
    ) -> TrajectoryBatch:
        """Return the cells of trajectories, keyed by ``key`` and their places from ``slot`` on."""

    @abc.abstractmethod
    def latents(self, rows: I64) -> Tensor:
        """Return whitened latents ``[n, D + 1]`` of cells: one draw each, always the same."""

    def _references(self, trajectories: Trajectories, cells: int) -> list[F32]:
        """Return the latents of at most ``cells`` cells of each population."""
        chosen = [trajectories.neighbours(number, cells, 0.0, number) for number in range(len(trajectories.edges) - 1)]
        every = np.concatenate(chosen)
        blocks = np.split(every, range(ENCODED, len(every), ENCODED))
        latents = torch.cat([self.latents(rows) for rows in blocks])
        return np.split(latents.numpy(), reference_edges(trajectories, cells)[1:-1])

    def _read(self, split: str, first: int, last: int, step: int) -> TrajectoryBatch:
        key = (self.config.seed, step) if split == TRAIN else (self.config.seed + 1, 0)
        return self.on_grids(self.orders[split].read(step, first, last), key, first * self.shape.size, step, split)

    def _shares(self, trajectories: int) -> list[tuple[int, int]]:
        """Return this rank's part of so many trajectories, in micro batches."""
        micro = batch_plan(self.config.train, self.world.size).micro // self.shape.size
        share = trajectories // self.world.size
        begin = self.world.rank * share
        return [(first, first + micro) for first in range(begin, begin + share, micro)]
