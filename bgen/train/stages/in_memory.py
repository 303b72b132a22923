"""Training on cells in memory: what fine-tuning on a user's AnnData runs on, with the same trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bgen.config.run import RunConfig
from bgen.data.batch import CellBatch
from bgen.data.cells_in_memory import MemoryCells, keys_of_step, rows_of_step
from bgen.distributed.world import World
from bgen.order.keys import hash_keys
from bgen.train.engine.deepspeed_json import batch_plan


class MemoryStage:
    """Batches of cells in memory for a module; the global batch is a pure function of seed and step.

    Parameters
    ----------
    config
        The run's configuration.
    module
        What is trained.
    cells
        All cells.
    train, valid
        Numbers of the cells to train on and of those to watch; every watched cell counts once.
    fingerprint
        See :class:`bgen.train.stages.stage.Stage`.
    """

    def __init__(
        self,
        config: RunConfig,
        module: nn.Module,
        cells: MemoryCells,
        train: NDArray[np.int64],
        valid: NDArray[np.int64],
        world: World,
        fingerprint: dict[str, Any],
        monitor: str = "loss",
    ) -> None:
        self.config, self.module, self.cells, self.world = config, module, cells, world
        self.train, self.valid, self.monitor = train, valid, monitor
        self.fingerprint = fingerprint

    @property
    def unit(self) -> int:
        """See :class:`bgen.train.stages.stage.SplitsBatches`."""
        return 1

    def split(self, config: RunConfig) -> None:
        """See :class:`bgen.train.stages.stage.SplitsBatches`."""
        self.config = config

    def train_batches(self, start_step: int) -> Iterator[Sequence[CellBatch]]:
        """See :class:`bgen.train.stages.stage.Stage`."""
        plan, total, step = batch_plan(self.config.train, self.world.size), self.config.train.global_batch, start_step
        share = total // self.world.size
        while True:
            rows = rows_of_step(self.train, total, step, self.config.seed)
            keys = keys_of_step(self.config.seed, step, total)
            prepared = self.prepare(rows, np.random.default_rng([self.config.seed, 1, step]))
            begin = self.world.rank * share
            yield [
                self.batch(prepared, keys, slice(first, first + plan.micro), step)
                for first in range(begin, begin + share, plan.micro)
            ]
            step += 1

    def valid_batches(self) -> Iterator[tuple[CellBatch, Tensor]]:
        """See :class:`bgen.train.stages.stage.Stage`."""
        micro = batch_plan(self.config.train, self.world.size).micro
        number = -(-len(self.valid) // (micro * self.world.size)) * self.world.size
        padded = np.resize(self.valid, number * micro)
        keys = hash_keys(self.config.seed + 1, np.arange(len(padded)))
        prepared = self.prepare(padded, np.random.default_rng([self.config.seed, 2]))
        for block in range(self.world.rank, number, self.world.size):
            part = slice(block * micro, (block + 1) * micro)
            weight = (np.arange(part.start, part.stop) < len(self.valid)).astype(np.float32)
            yield self.batch(prepared, keys, part, 0), torch.from_numpy(weight)

    def prepare(self, rows: NDArray[np.int64], rng: np.random.Generator) -> Any:
        """Return what :meth:`batch` takes its parts from: here the numbers of the cells."""
        return rows

    def batch(self, prepared: Any, keys: NDArray[np.uint64], part: slice, step: int) -> CellBatch:
        """Return a part of the global batch."""
        return self.cells.batch(prepared[part], keys[part], step, part.start)

    def finish(self, module: nn.Module) -> None:
        """See :class:`bgen.train.stages.stage.Stage`; nothing is left to do."""


def split_watched(cells: NDArray[np.int64], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the cells to train on and a ``share`` (at least one) to watch, the same on every rank."""
    order = cells[np.argsort(hash_keys(seed, cells))]
    watched = min(max(1, round(share * len(cells))), len(cells) - 1)
    return np.sort(order[watched:]), np.sort(order[:watched])
