"""The stage that trains the flow in the latent space of a frozen VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from bgen.config.run import Config
from bgen.distributed.world import World
from bgen.errors import UserError
from bgen.genes.table import hash_genes
from bgen.hub.directory import SavedModel, load_directory
from bgen.models.generators.latent_flow import LatentFlow
from bgen.store.store import Store
from bgen.train.stages.from_store import StoreStage
from bgen.train.stages.levels import fit_generated_levels


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

    def finish(self, module: nn.Module) -> None:
        """Fit the genes' levels of the flow's own copy of the VAE, shared among the ranks."""
        assert isinstance(module, LatentFlow)
        if self.config.flow.fit_levels:
            fit_generated_levels(module, self.config.sample, self.reader, self.config.data.split, self.world)


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
