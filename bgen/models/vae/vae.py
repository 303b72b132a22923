"""Variational autoencoder of counts: from a cell's sparse counts to a latent state and back.

    x ~ NB(library * softmax(decoder(z, covariates)), theta),   q(z | x, covariates) = N(mean, exp(logvar))
    loss = -log p(x | z) + w(step) * sum_d max(KL_d - free bits, 0)

Axes: B cells, G genes, D latent size, H hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.errors import UserError, nearest
from bgen.models.codec import CountsCodec
from bgen.models.likelihoods.negative_binomial import NegativeBinomial, ZeroInflatedNegativeBinomial
from bgen.models.vae.decoders.registry import build_decoder
from bgen.models.vae.encoders.registry import build_encoder
from bgen.models.vae.gene_table import GeneTable
from bgen.models.vae.levels import LevelStats
from bgen.models.vae.panel import on_panels
from bgen.models.vae.thinning import thin
from bgen.nn.gpu.draws import normal
from bgen.nn.mup import learning_rate_scales, start_heads
from bgen.nn.random import Stream


class VAE(CountsCodec):
    """The autoencoder, its loss, and the whitening of its latents.

    Parameters
    ----------
    config
        Settings.
    n_genes
        G.
    covariates
        obs column to its number of categories: what ``config.covariates`` names, resolved to columns.
    """

    compiles = ("posterior",)

    def __init__(self, config: VAEConfig, n_genes: int, covariates: Mapping[str, int]) -> None:
        super().__init__(config.latent, n_genes, covariates)
        self.config = config
        self.encoder = build_encoder(config, n_genes, covariates)
        self.decoder = build_decoder(config, n_genes, covariates)
        if config.transfer_from is not None:
            start_heads(self, self._twin())

    @property
    def log_theta(self) -> Tensor:
        """``[G]``: log inverse dispersion of each gene."""
        return self.decoder.log_theta

    def describe_genes(self, genes: pd.DataFrame) -> list[str]:
        """Let both halves read what their settings name of the genes of the table; return sentences for the user.

        Raises
        ------
        UserError
            If a file cannot be used.
        """
        return [*self.encoder.describe_genes(genes), *self.decoder.describe_genes(genes)]

    @property
    def vector_tables(self) -> dict[str, GeneTable]:
        """The gene tables that know genes by vectors, of "encoder" and "decoder" where they have one."""
        tables = {"encoder": self.encoder.vector_table, "decoder": self.decoder.vector_table}
        return {half: table for half, table in tables.items() if table is not None}

    def look_at(self, batch: CellBatch) -> None:
        """Start from a sample of the cells of training: its mean counts, and what the encoder wants to know of it."""
        total = torch.zeros(batch.n_genes, dtype=torch.float64)
        total.index_add_(0, batch.indices.long(), batch.counts.double())
        self.initialise_genes((total / len(batch)).float())
        self.encoder.look_at(batch)

    def initialise_genes(self, mean_counts: Tensor) -> None:
        """Start the decoder at the genes' average proportions, from their mean counts ``[G]`` over training cells."""
        self.decoder.initialise_genes(mean_counts)

    def forward(self, batch: CellBatch) -> dict[str, Tensor]:
        """Return per-cell ``loss``, ``nll`` and ``kl``, each ``[B]``, in nats.

        In training the encoder sees counts thinned and on panels, hidden units are dropped, and the KL weight warms up
        with ``batch.step``; in evaluation none of these. The posterior is sampled from ``batch.keys`` in both.
        """
        self._require_covariates(batch)
        mean, logvar = self.encoder(batch, self.shown(batch))
        z, kl, penalised = self.posterior(mean, logvar, batch.keys)
        nll = -self.decode(z, batch.library, batch.obs, batch.keys).log_prob_sparse(batch)
        return {"loss": nll + self.kl_weight(batch.step) * penalised, "nll": nll, "kl": kl}

    def posterior(self, mean: Tensor, logvar: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a sample ``z [B, D]``, the KL divergence ``[B]``, and what of it counts in the loss, ``[B]``."""
        kl_BD = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        penalised = (kl_BD - self.config.free_bits).clamp_min(0) if self.config.free_bits > 0 else kl_BD
        return self.posterior_sample(mean, logvar, keys), kl_BD.sum(dim=1), penalised.sum(dim=1)

    def shown(self, batch: CellBatch) -> Tensor:
        """Return what the encoder sees of the counts, ``[NNZ]``: in training fewer of some cells, and fewer genes."""
        counts = thin(batch, self.config.thinning) if self.training and self.config.thinning > 0 else batch.counts
        panel = self.config.panel
        return on_panels(batch, counts, panel.share, panel.most) if self.training and panel.share > 0 else counts

    def kl_weight(self, step: int) -> float:
        """Weight of the KL term: in training it rises linearly from 0 at step 0."""
        if not self.training or self.config.kl_warmup == 0:
            return self.config.kl_weight
        return self.config.kl_weight * min(1.0, step / self.config.kl_warmup)

    def encode(self, batch: CellBatch) -> tuple[Tensor, Tensor]:
        """See :class:`CountsCodec`: the posterior's mean and log-variance, from the full counts."""
        self._require_covariates(batch)
        return self.encoder(batch, batch.counts)

    @staticmethod
    def posterior_sample(mean: Tensor, logvar: Tensor, keys: Tensor) -> Tensor:
        """Draw ``z [B, D]`` from N(mean, exp(logvar)), keyed by ``keys [B]``."""
        return mean + torch.exp(0.5 * logvar) * normal(keys, Stream.POSTERIOR, mean.shape[1])

    def decode(
        self, z: Tensor, library: Tensor, covariates: Mapping[str, Tensor], keys: Tensor | None = None
    ) -> NegativeBinomial | ZeroInflatedNegativeBinomial:
        """See :class:`bgen.models.codec.Codec`."""
        logits, log_theta, *dropout_logits = self.decoder(z, covariates, keys)
        if dropout_logits:
            return ZeroInflatedNegativeBinomial(logits, library, log_theta, *dropout_logits)
        return NegativeBinomial(logits, library, log_theta)

    def states(self, batch: CellBatch) -> Tensor:
        """See :class:`CountsCodec`: posterior samples."""
        mean, logvar = self.encode(batch)
        return self.posterior_sample(mean, logvar, batch.keys)

    @torch.no_grad()
    def accumulate_levels(self, stats: LevelStats, batch: CellBatch) -> None:
        """Add a batch to ``stats``, each cell explained by a posterior sample."""
        stats.explain(batch, self.decode(self.states(batch), batch.library, batch.obs))

    def shift_genes(self, by: Tensor) -> None:
        """See :class:`CountsCodec`."""
        self.decoder.shift_genes(by)

    def latents_flops(self, cells: int, nonzeros: int) -> int:
        """See :class:`bgen.models.codec.Codec`: the encoder's."""
        return self.encoder.flops(cells, nonzeros)

    def training_flops(self, batch: CellBatch) -> int:
        """Floating-point operations of the forward and backward pass over a batch."""
        cells = len(batch)
        return self.encoder.training_flops(cells, len(batch.counts)) + 3 * self.decoder.flops(cells)

    def learning_rate_scales(self) -> dict[str, float]:
        """See :class:`bgen.nn.mup.Transfers`."""
        return {} if self.config.transfer_from is None else learning_rate_scales(self, self._twin())

    def _twin(self) -> VAE:
        """Return this model at the width that the learning rate is transferred from, without memory."""
        base = {"hidden": self.config.transfer_from, "transfer_from": None}
        with torch.device("meta"):
            return VAE(self.config.model_copy(update=base), self.n_genes, self.covariates)

    def _require_covariates(self, batch: CellBatch) -> None:
        for name in self.covariates:
            if name not in batch.obs:
                raise UserError(
                    f"The VAE was trained with covariate '{name}', which the data does not have."
                    f"{nearest(name, batch.obs)} Add the column, with -1 where it is unknown."
                )
