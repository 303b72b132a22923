"""The batches of a stage that trains on trajectories of populations instead of single cells."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bgen.config.run import Config
from bgen.data.batch import CellBatch
from bgen.data.loader import CountReader
from bgen.data.trajectory_loader import TrajectoryLoader, read_trajectories, valid_trajectories
from bgen.distributed.world import World, all_sum
from bgen.errors import UserError
from bgen.flow.plans import Plans
from bgen.flow.references import plans_of, reference_edges, require_room
from bgen.models.codec import Codec
from bgen.order.mixing import Mixing
from bgen.order.pools import PooledTrajectories
from bgen.order.trajectories import Trajectories, TrajectoryOrder, share_of_way

FAR_APART = 8.0
"""Cells decoded for one that is used, above which the user is told."""

TOGETHER = 16_384
"""Cells that are read at a time for means of populations, about: neighbours of populations that share chunks."""

ENCODED = 1024
"""Cells of them that are encoded at a time."""


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
        about = self._about(config.data.split)
        self.order = PooledTrajectories(
            **about, lanes=config.data.lanes, pool=self.shape.pool, first_cell=reader.store.first_cell
        )
        if self.order.decoded > FAR_APART and world.is_main:
            print(
                f"warning: the store {reader.store.folder} does not hold populations together: training decodes about"
                f" {self.order.decoded:.0f} cells for each one that it uses. Build it with --population COLUMN, whose"
                f" values name these populations, or raise data.trajectories.pool={self.shape.pool}.",
                file=sys.stderr,
                flush=True,
            )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        return {"trajectories": self.shape.model_dump(mode="json")}

    def train(self, start_step: int, mixing: Mixing | None = None) -> Iterator[Sequence[CellBatch]]:
        """See :class:`bgen.train.stages.stage.Stage`; ``mixing`` says what trajectories are moved by."""
        loader = TrajectoryLoader(
            self.reader,
            self.order,
            seed=self.config.seed,
            rank=self.world.rank,
            world=self.world.size,
            micro_batch=self.micro,
            prefetch=self.config.data.prefetch,
            mixing=mixing,
        )
        return loader.steps(start_step)

    def valid(self) -> list[tuple[CellBatch, Tensor]]:
        """Read this rank's held-out trajectories."""
        return valid_trajectories(
            self.reader,
            self.watched,
            seed=self.config.seed,
            cells=self.config.train.eval_cells,
            micro_batch=self.micro,
            rank=self.world.rank,
            world=self.world.size,
        )

    @cached_property
    def watched(self) -> TrajectoryOrder:
        """The held-out trajectories, whose populations are numbered after those of training."""
        first = len(self.order.trajectories.edges) - 1
        return TrajectoryOrder(**self._about(self.config.data.valid), first_population=first)

    @property
    def splits(self) -> list[Trajectories]:
        """The trajectories of training, and the held-out ones if there are evaluations."""
        return [self.order.trajectories, *([self.watched.trajectories] if self.config.train.eval_every else [])]

    def require_room(self, size: int) -> None:
        """Raise UserError if references of whole populations, of latents ``[size]``, are too large to hold."""
        require_room(self.splits, size, self.config.flow.coupling.cells)

    def plans(self, codec: Codec) -> Plans:
        """Encode the references of all populations, and return the plans between them."""
        coupling = self.config.flow.coupling
        return plans_of(
            [population_latents(codec, self.reader, split, coupling.cells, self.world) for split in self.splits],
            coupling,
        )

    def _about(self, split: str) -> dict[str, Any]:
        """Return the parameters of the order of a split."""
        store, members = self.reader.store, self.config.flow.members
        return {
            "trajectories": read_trajectories(store, split, self.shape, members.amount if members else None),
            "batch": self.config.train.global_batch // self.shape.size,
            "times": self.shape.times,
            "cells": self.shape.cells,
            "seed": self.config.seed,
            "name": f"{store.fingerprint}/{split}",
        }


def population_means(
    codec: Codec, reader: CountReader, trajectories: Trajectories, cells: int, world: World
) -> NDArray[np.float32]:
    """Return the mean whitened latent of at most ``cells`` cells of every population: float32 ``[P, D + 1]``.

    The populations are dealt to the ranks in the same groups for any number of them, so that the sums are the same.
    """
    means = torch.zeros(len(trajectories.edges) - 1, codec.size)
    for population, z in _encoded(codec, reader, trajectories, cells, world):
        means[population] = z.mean(0)
    return all_sum(means).numpy()


def population_latents(
    codec: Codec, reader: CountReader, trajectories: Trajectories, cells: int, world: World
) -> list[NDArray[np.float32]]:
    """Return the whitened latents of at most ``cells`` cells of every population, float32 ``[M, D + 1]`` each.

    The ranks share the work as in :func:`population_means`, and each has all of them in the end.
    """
    edges = reference_edges(trajectories, cells)
    latents = torch.zeros(int(edges[-1]), codec.size)
    for population, z in _encoded(codec, reader, trajectories, cells, world):
        latents[edges[population] : edges[population + 1]] = z
    return np.split(all_sum(latents).numpy(), edges[1:-1])


@torch.no_grad()
def _encoded(
    codec: Codec, reader: CountReader, trajectories: Trajectories, cells: int, world: World
) -> Iterator[tuple[int, Tensor]]:
    """Yield this rank's populations, each with the latents ``[min(size, cells), D + 1]`` of neighbours in its line."""
    n = len(trajectories.edges) - 1
    size = max(1, TOGETHER // cells)
    groups = [range(start, min(start + size, n)) for start in range(0, n, size)]
    for number, group in list(enumerate(groups))[world.rank :: world.size]:
        at = share_of_way(number)
        members = [trajectories.neighbours(population, cells, at, population) for population in group]
        every, back = np.unique(np.concatenate(members), return_inverse=True)
        batch = reader.read_cells(every)
        parts = torch.arange(len(every)).split(ENCODED)
        z = torch.cat([codec.latents(batch.take(part).to(world.device)).cpu() for part in parts])[
            torch.from_numpy(back)
        ]
        yield from zip(group, z.split([len(some) for some in members]), strict=True)
