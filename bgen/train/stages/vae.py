"""The stage that trains the VAE of counts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bgen.config.run import Config
from bgen.distributed.world import World
from bgen.errors import UserError
from bgen.models.vae.vae import VAE
from bgen.store.store import Store
from bgen.train.stages.from_store import StoreStage
from bgen.train.stages.levels import fit_levels
from bgen.train.stages.whitening import fit_whitening, keyed_sample

START_CELLS = 8_192
"""Training cells whose mean counts the decoder starts from."""


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
        """Fit the genes' levels and the whitening of the latents on training cells, shared among the ranks."""
        assert isinstance(module, VAE)
        if self.config.vae.fit_levels:
            fit_levels(module, self.reader, self.config.data.split, self.world)
        fit_whitening(module, self.reader, self.config.data.split, self.world)

    def _mean_counts(self) -> Tensor:
        """Mean counts ``[G]`` over a keyed sample of training cells, the same on every rank."""
        cells = keyed_sample(self.store.cells_of_split(self.config.data.split), START_CELLS, self.config.seed)
        batch = self.reader.read_cells(cells)
        total = torch.zeros(batch.n_genes, dtype=torch.float64)
        total.index_add_(0, batch.indices.long(), batch.counts.double())
        return (total / len(cells)).float()
