"""The two stages of training: the VAE of counts, and the rectified flow in its latent space."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bgen.checkpoint.weights import export_weights
from bgen.config.load import load_config
from bgen.config.run import Config
from bgen.data.batch import CellBatch
from bgen.data.loader import CountReader, TrainLoader, valid_batches
from bgen.data.packed import PackedBatch
from bgen.data.skip_damage import SkippingReader
from bgen.distributed.world import World, all_sum, gather
from bgen.errors import UserError
from bgen.genes.table import hash_genes
from bgen.hub.directory import SavedModel, load_directory
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.vae.vae import VAE
from bgen.order.cells import Order
from bgen.order.keys import hash_keys
from bgen.order.weighted import weighted_order
from bgen.store.open import open_data
from bgen.store.store import Store
from bgen.train.engine.deepspeed_json import batch_plan
from bgen.train.stages.trajectories_from_store import TrajectorySource

START_CELLS = 8_192
"""Training cells whose mean counts the decoder starts from."""

WHITENING_CELLS = 262_144
"""Training cells that the latents' mean and standard deviation are taken over, at most."""


class StoreStage:
    """What both stages share: batches from a store.

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
        # to a GPU go the packed bytes, a quarter of the counts, from pinned memory; it unpacks them itself
        self.packed = world.device.type == "cuda"
        self.reader = (SkippingReader if data.on_damage == "skip" else CountReader)(store, columns, pinned=self.packed)
        self.order = self._order()
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


class VAEStage(StoreStage):
    """Trains a VAE; watches the held-out negative log-likelihood."""

    monitor = "nll"

    def __init__(self, config: Config, store: Store, world: World) -> None:
        columns = [store.column_name(name) for name in config.vae.covariates]
        super().__init__(config, store, world, columns)
        categories = {}
        for name in columns:
            column = store.manifest.columns[name]
            if column.kind != "category":
                raise UserError(f"vae.covariates: '{name}' holds numbers; covariates are categories, such as batch.")
            categories[name] = len(column.categories)
        self.module = VAE(config.vae, store.manifest.n_genes, categories)
        self.module.initialise_genes(self._mean_counts())

    def finish(self, module: nn.Module) -> None:
        """Fit the whitening of the latents on training cells, shared among the ranks."""
        assert isinstance(module, VAE)
        fit_whitening(module, self.reader, self.config.data.split, self.world)

    def _mean_counts(self) -> Tensor:
        """Mean counts ``[G]`` over a keyed sample of training cells, the same on every rank."""
        cells = keyed_sample(self.store.cells_of_split(self.config.data.split), START_CELLS, self.config.seed)
        batch = self.reader.read_cells(cells)
        total = torch.zeros(batch.n_genes, dtype=torch.float64)
        total.index_add_(0, batch.indices.long(), batch.counts.double())
        return (total / len(cells)).float()


class FlowStage(StoreStage):
    """Trains the velocity network on the latents of a frozen VAE."""

    def __init__(self, config: Config, store: Store, world: World) -> None:
        assert config.flow.vae is not None, "the configuration checks that"
        self.vae_model = load_vae(config.flow.vae, store)
        vae = self.vae_model.vae
        conditions = [store.column_name(name) for name in config.flow.conditions]
        super().__init__(config, store, world, list(dict.fromkeys([*conditions, *vae.covariates])))
        categories, self.numbers = {}, {}
        train_cells = store.cells_of_split(config.data.split)
        for name in conditions:
            column, values = store.column(name)
            if column.kind == "category":
                categories[name] = len(column.categories)
            else:
                self.numbers[name] = mean_and_std(values[train_cells])
        self.module = LatentFlow(config.flow, vae, categories, self.numbers)
        self.fingerprint["vae"] = self.vae_model.fingerprint()


def fit_whitening(vae: VAE, reader: CountReader, split: str, world: World) -> None:
    """Fit a VAE's whitening on (at most :data:`WHITENING_CELLS`) cells of a split; every rank takes a share."""
    cells = keyed_sample(reader.store.cells_of_split(split), WHITENING_CELLS, 0)
    stats = vae.whitening_stats()
    for part in np.array_split(cells, -(-len(cells) // 1024))[world.rank :: world.size]:
        vae.accumulate_whitening(stats, reader.read_cells(part).to(world.device))
    stats.sums.copy_(all_sum(stats.sums.cpu()))
    stats.bounds.copy_(torch.stack(gather(stats.bounds.cpu())).amax(dim=0))
    vae.fit_whitening(stats)


def keyed_sample(cells: np.ndarray[Any, np.dtype[np.int64]], n: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return at most ``n`` of the cells, ascending, the same on every rank."""
    if len(cells) <= n:
        return cells
    return np.sort(cells[np.argsort(hash_keys(seed, cells))[:n]])


def mean_and_std(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return mean and standard deviation of the known values; 0 and 1 where there is nothing to scale by."""
    known = values[np.isfinite(values)]
    if len(known) == 0:
        return 0.0, 1.0
    return float(known.mean()), float(known.std()) or 1.0


def load_vae(folder: Path, store: Store) -> SavedModel:
    """Return the VAE of a run folder or of an exported directory, with the store's genes in the store's order.

    Raises
    ------
    UserError
        If there is none, or it was trained on other genes.
    """
    exported = folder if (folder / "config.json").is_file() else folder / "model"
    if not (exported / "config.json").is_file():
        raise UserError(f"flow.vae: there is no trained VAE in {folder}. `bgen train` with stage: vae makes one.")
    model = load_directory(exported)
    if hash_genes(model.genes["id"].tolist()) != store.manifest.genes_sha256:
        raise UserError(
            f"flow.vae: the VAE in {folder} was trained on other genes (or in another order) than {store.folder} has."
            " Train the VAE on this store."
        )
    return model


def rebuild(run: Path, world: World) -> tuple[Config, StoreStage, Path]:
    """Return a run's configuration, and its stage with the weights of its newest verified checkpoint."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml. `bgen train` makes one.")
    config = load_config(run / "config.yaml")
    weights, checkpoint = export_weights(run / "checkpoints")
    stage = make_stage(config, open_data(config.data), world)
    stage.module.load_state_dict(weights)
    stage.module.eval()
    return config, stage, checkpoint


def make_stage(config: Config, store: Store, world: World) -> VAEStage | FlowStage:
    """Build the stage that a configuration names."""
    if config.stage == "perturb":
        raise UserError("stage: perturb is trained on control and perturbed cells by `bgen finetune --task perturb`.")
    torch.manual_seed(config.seed)  # the initial weights
    return VAEStage(config, store, world) if config.stage == "vae" else FlowStage(config, store, world)
