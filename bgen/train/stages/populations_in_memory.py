"""Training on control and perturbed populations of cells in memory: what ``bgen finetune --task perturb`` runs on.

The autoencoder is frozen, so every cell is encoded once; a batch draws from the posteriors, which is what the decoder
was trained on.

Axes: N cells in memory, B trajectories, T time points, D latent size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bgen.arrays import I64
from bgen.config.data import TrajectoriesConfig
from bgen.config.finetune import FinetuneConfig
from bgen.data.batch import CellBatch
from bgen.data.cells_in_memory import MemoryCells
from bgen.data.trajectory_batch import TrajectoryBatch
from bgen.distributed.world import World
from bgen.models.generators.latent_flow import LatentFlow
from bgen.order.keys import hash_keys
from bgen.order.mixing import Mixing
from bgen.order.trajectories import GridOfCells, Trajectories
from bgen.train.stages.trajectories_in_memory import TRAIN, VALID, MemoryTrajectoryStage

MOST_REPEATS = 1000
"""How often a population comes in an epoch, at most."""


@dataclass(frozen=True)
class EncodedCells:
    """Posteriors of cells.

    Attributes
    ----------
    mean, std
        float32 ``[N, D + 1]``, whitened; the log library size, last, has standard deviation 0.
    obs
        Column to codes or numbers ``[N]``.
    """

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    obs: Mapping[str, NDArray[Any]]


class PopulationStage(MemoryTrajectoryStage):
    """Trains a :class:`LatentFlow` along perturbations; see :class:`MemoryTrajectoryStage` for the other parameters.

    Parameters
    ----------
    encoded
        The cells.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        module: LatentFlow,
        cells: MemoryCells,
        encoded: EncodedCells,
        shape: TrajectoriesConfig,
        train: Trajectories,
        valid: Trajectories,
        world: World,
        fingerprint: dict[str, Any],
    ) -> None:
        train, valid = (as_often_as_cells(trajectories, shape.cells) for trajectories in (train, valid))
        super().__init__(config, module, cells, shape, train, valid, world, fingerprint)
        self.encoded = encoded
        mixing = config.flow.mixing
        self.mixing: Mixing | None = None
        if mixing.share > 0:
            self.mixing = Mixing(train, self._means(train), mixing.share, mixing.concentration, config.seed)

    def watched(self) -> int:
        """See :class:`MemoryTrajectoryStage`: every watched trajectory at least once."""
        order = self.orders[VALID]
        return order.batch * -(-len(order.trajectories) // order.batch)

    def on_grids(
        self, grids: list[GridOfCells], key: tuple[int, int], slot: int, step: int, split: str
    ) -> TrajectoryBatch:
        """See :class:`MemoryTrajectoryStage`: latents are drawn from the posteriors; training ones may be mixed."""
        rows = np.stack([grid.cells for grid in grids]).ravel()
        rng = np.random.default_rng([*key, slot])
        noise = rng.standard_normal((len(rows), self.encoded.mean.shape[1]))
        latents = self.encoded.mean[rows] + self.encoded.std[rows] * noise.astype(np.float32)
        cells = CellBatch(
            indptr=torch.zeros(len(rows) + 1, dtype=torch.int64),
            indices=torch.zeros(0, dtype=torch.int32),
            counts=torch.zeros(0),
            n_genes=self.cells.counts.shape[1],
            keys=torch.from_numpy(hash_keys(*key, slot + np.arange(len(rows))).view(np.int64)),
            cells=torch.from_numpy(rows),
            step=step,
            first_slot=slot,
            obs={name: torch.from_numpy(column[rows]) for name, column in self.encoded.obs.items()},
        )
        batch = TrajectoryBatch.of_grids(cells, grids, self.mixing if split == TRAIN else None)
        return replace(batch, whitened=torch.from_numpy(latents))

    def latents(self, rows: I64) -> Tensor:
        """See :class:`MemoryTrajectoryStage`."""
        noise = np.random.default_rng([self.config.seed, 3, int(rows[0])]).standard_normal(
            (len(rows), self.encoded.mean.shape[1])
        )
        return torch.from_numpy(self.encoded.mean[rows] + self.encoded.std[rows] * noise.astype(np.float32))

    def _means(self, trajectories: Trajectories) -> NDArray[np.float32]:
        """Return the mean latent ``[P, D + 1]`` of every population."""
        sums = np.add.reduceat(
            self.encoded.mean[trajectories.cells].astype(np.float64), trajectories.edges[:-1], axis=0
        )
        means: NDArray[np.float32] = (sums / np.diff(trajectories.edges)[:, None]).astype(np.float32)
        return means


def as_often_as_cells(trajectories: Trajectories, cells: int) -> Trajectories:
    """Let every trajectory come as often in an epoch as its perturbed cells fill ``cells`` places."""
    sizes = np.diff(trajectories.edges)
    times = [int(np.clip(round(sizes[points[1:]].mean() / cells), 1, MOST_REPEATS)) for points in trajectories.points]
    again: I64 = np.repeat(np.arange(len(times)), times)
    return replace(
        trajectories,
        points=[trajectories.points[at] for at in again.tolist()],
        times=[trajectories.times[at] for at in again.tolist()],
        controls=[trajectories.controls[at] for at in again.tolist()],
        treatment=trajectories.treatment[again],
    )
