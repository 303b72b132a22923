"""What the stages that train on a store share."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from bgen.config.run import Config, RunConfig
from bgen.data.batch import CellBatch
from bgen.data.loader import CountReader, TrainLoader, valid_batches
from bgen.data.packed import PackedBatch
from bgen.data.skip_damage import SkippingReader
from bgen.distributed.world import World
from bgen.errors import UserError
from bgen.genes.table import hash_genes
from bgen.order.cells import Order
from bgen.store.store import Store
from bgen.store.weighting import weighted_order
from bgen.train.engine.deepspeed_json import batch_plan
from bgen.train.stages.trajectories_from_store import TrajectorySource


class StoreStage:
    """A stage that takes its batches from a store.

    Parameters
    ----------
    config
        The run's configuration.
    store
        The store that it names.
    world
        This rank's place.
    columns
        Columns of obs that the module needs.
    """

    module: nn.Module
    monitor = "loss"

    def __init__(self, config: Config, store: Store, world: World, columns: Sequence[str]) -> None:
        self.config, self.store, self.world = config, store, world
        data, train = config.data, config.train
        # a GPU gets the packed bytes, a quarter of the size, from pinned memory, and unpacks them itself
        self.packed = world.device.type == "cuda"
        self.reader = (SkippingReader if data.on_damage == "skip" else CountReader)(store, columns, pinned=self.packed)
        self.order = self._order()
        self._require_what_is_read()
        self.fingerprint: dict[str, Any] = {
            "store": store.fingerprint,
            "genes": hash_genes(store.genes["id"].tolist()),
            "split": data.split,
            "order": [config.seed, train.global_batch, data.lanes, data.window],
        }
        if data.weighting is not None:
            self.fingerprint["weighting"] = data.weighting.model_dump(mode="json")
        self.trajectories: TrajectorySource | None = None
        if data.trajectories is not None:
            micro_batch = batch_plan(train, world.size).micro
            self.trajectories = TrajectorySource(config, self.reader, world, micro_batch)
            self.fingerprint |= self.trajectories.fingerprint
        self._valid: list[tuple[CellBatch, Tensor]] | None = None

    def train_batches(self, start_step: int) -> Iterator[Sequence[CellBatch | PackedBatch]]:
        """See :class:`bgen.train.stages.stage.Stage`."""
        if self.trajectories is not None:
            return self.trajectories.train(start_step)
        plan = batch_plan(self.config.train, self.world.size)
        loader = TrainLoader(
            self.reader,
            self.order,
            seed=self.config.seed,
            rank=self.world.rank,
            world=self.world.size,
            micro_batch=plan.micro,
            prefetch=self.config.data.prefetch,
        )
        return loader.packed_steps(start_step) if self.packed else loader.steps(start_step)

    @property
    def unit(self) -> int:
        """See :class:`bgen.train.stages.stage.SplitsBatches`."""
        return 1 if self.trajectories is None else self.trajectories.shape.size

    def split(self, config: RunConfig) -> None:
        """See :class:`bgen.train.stages.stage.SplitsBatches`."""
        self.config = self.config.model_copy(update={"train": config.train})
        self._valid = None
        if self.trajectories is not None:
            self.trajectories.micro = batch_plan(config.train, self.world.size).micro // self.unit

    def valid_batches(self) -> Iterator[tuple[CellBatch, Tensor]]:
        """See :class:`bgen.train.stages.stage.Stage`; the held-out cells are read once and kept."""
        if self._valid is None and self.trajectories is not None:
            self._valid = self.trajectories.valid()
        elif self._valid is None:
            plan = batch_plan(self.config.train, self.world.size)
            self._valid = valid_batches(
                self.reader,
                self.config.data.valid,
                seed=self.config.seed,
                cells=self.config.train.eval_cells,
                micro_batch=plan.micro,
                rank=self.world.rank,
                world=self.world.size,
            )
        return iter(self._valid)

    def finish(self, module: nn.Module) -> None:
        """See :class:`bgen.train.stages.stage.Stage`."""

    def damage(self) -> dict[int, str]:
        """See :class:`bgen.train.stages.stage.CountsDamage`."""
        return self.reader.skipped if isinstance(self.reader, SkippingReader) else {}

    def damaged_cells(self) -> int:
        """See :class:`bgen.train.stages.stage.CountsDamage`."""
        return self.reader.skipped_cells if isinstance(self.reader, SkippingReader) else 0

    def _require_what_is_read(self) -> None:
        """Refuse an empty held-out split before the first step, not at the first evaluation; warn of too few lanes."""
        data, train = self.config.data, self.config.train
        if train.eval_every and len(self.store.split(data.valid)) == 0:
            raise UserError(
                f"The split '{data.valid}' of {data.store} holds no cells: choose another data.valid, or train without"
                " held-out cells (train.eval_every=0)."
            )
        if self.world.size > data.lanes and self.world.is_main:
            factor = self.world.size / data.lanes
            print(
                f"warning: {self.world.size} ranks share data.lanes={data.lanes} lanes, so that each chunk is read"
                f" about {factor:.2g} times. Begin the run with data.lanes={self.world.size} or more.",
                file=sys.stderr,
                flush=True,
            )

    def _order(self) -> Order:
        data, batch, seed = self.config.data, self.config.train.global_batch, self.config.seed
        if data.weighting is None:
            return self.store.order(data.split, batch=batch, lanes=data.lanes, window=data.window, seed=seed)
        return weighted_order(
            self.store,
            data.split,
            batch=batch,
            lanes=data.lanes,
            window=data.window,
            seed=seed,
            temperature=data.weighting.temperature,
            by=data.weighting.by,
        )
