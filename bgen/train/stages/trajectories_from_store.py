"""The batches of a stage that trains on trajectories of populations instead of single cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from bgen.config.run import Config
from bgen.data.batch import CellBatch
from bgen.data.loader import CountReader
from bgen.data.trajectory_loader import TrajectoryLoader, read_trajectories, valid_trajectories
from bgen.distributed.world import World
from bgen.errors import UserError
from bgen.order.trajectories import TrajectoryOrder


class TrajectorySource:
    """Trajectories of a store's splits, for one rank.

    Parameters
    ----------
    config
        The run's configuration, with ``data.trajectories``.
    reader
        What reads the cells.
    world
        This rank's place.
    micro_batch
        Cells per forward pass.

    Raises
    ------
    UserError
        If the store has no such trajectories, or ranks and micro batches do not hold whole ones.
    """

    def __init__(self, config: Config, reader: CountReader, world: World, micro_batch: int) -> None:
        assert config.data.trajectories is not None
        self.config, self.shape, self.reader, self.world = config, config.data.trajectories, reader, world
        if micro_batch % self.shape.size:
            unit = self.shape.size * world.size
            raise UserError(
                f"train.global_batch={config.train.global_batch}: each of {world.size} ranks needs whole trajectories "
                f"of data.trajectories.times x cells = {self.shape.size} cells. Nearest that works: "
                f"{max(1, round(config.train.global_batch / unit)) * unit}."
            )
        self.micro = micro_batch // self.shape.size
        self.order = self._order(config.data.split)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        return {"trajectories": self.shape.model_dump(mode="json")}

    def train(self, start_step: int) -> Iterator[Sequence[CellBatch]]:
        """See :class:`bgen.train.stages.stage.Stage`."""
        loader = TrajectoryLoader(
            self.reader,
            self.order,
            seed=self.config.seed,
            rank=self.world.rank,
            world=self.world.size,
            micro_batch=self.micro,
            prefetch=self.config.data.prefetch,
        )
        return loader.steps(start_step)

    def valid(self) -> list[tuple[CellBatch, Tensor]]:
        """Read this rank's held-out trajectories."""
        return valid_trajectories(
            self.reader,
            self._order(self.config.data.valid),
            seed=self.config.seed,
            cells=self.config.train.eval_cells,
            micro_batch=self.micro,
            rank=self.world.rank,
            world=self.world.size,
        )

    def _order(self, split: str) -> TrajectoryOrder:
        store = self.reader.store
        return TrajectoryOrder(
            read_trajectories(store, split, self.shape),
            batch=self.config.train.global_batch // self.shape.size,
            times=self.shape.times,
            cells=self.shape.cells,
            seed=self.config.seed,
            name=f"{store.fingerprint}/{split}",
        )
