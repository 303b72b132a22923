"""The stage that trains the VAE of counts."""

from __future__ import annotations

import sys

from torch import nn

from bgen.checkpoint.files import sha256
from bgen.config.run import Config
from bgen.config.section import named_files
from bgen.distributed.world import World
from bgen.errors import UserError
from bgen.models.vae.vae import VAE
from bgen.store.store import Store
from bgen.train.stages.from_store import StoreStage
from bgen.train.stages.levels import fit_levels
from bgen.train.stages.whitening import fit_whitening

START_CELLS = 8_192
"""Training cells whose statistics the VAE starts from."""


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
        some = store.sample(store.split(config.data.split), START_CELLS, config.seed)
        self.module.look_at(self.reader.read_cells(some))  # the same on every rank
        self._describe_genes(self.module)

    def finish(self, module: nn.Module) -> None:
        """Fit the genes' levels and the whitening of the latents on training cells, shared among the ranks."""
        assert isinstance(module, VAE)
        if self.config.vae.fit_levels:
            fit_levels(module, self.reader, self.config.data.split, self.world)
        fit_whitening(module, self.reader, self.config.data.split, self.world)

    def _describe_genes(self, vae: VAE) -> None:
        """Tell the VAE what files say of the genes, and the user how much that is; it must not change on resume."""
        said = vae.describe_genes(self.store.genes)
        if not said:
            return
        # Of the files, not of what was computed from them: its last bits differ from one kind of processor to another.
        self.fingerprint["known_of_genes"] = [sha256(path) for path in named_files(self.config.vae)]
        if self.world.is_main:
            print("\n".join(said), file=sys.stderr, flush=True)
