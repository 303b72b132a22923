"""The decoder whose rows come from a gene table: what genes have in common is told by the table, the rest by own rows.

    logits_g = <h, U_g + W e_g> + b_g = <h, U_g> + <W' h, e_g> + b_g

with e_g a gene's row in the table (bgen/models/vae/gene_table.py), made from vectors alone where there are any.
Training then takes U_g away from some genes of each cell, so that W learns to stand alone. The own rows U_g, levels
b_g, dispersions, and all else, are those of the decoder ``state_vector``.

Axes: B cells, G genes, H hidden width, E width of a gene's row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd
import torch
from torch import Tensor, nn

from bgen.config.gene_set import GeneTableDecoderConfig
from bgen.config.vae import VAEConfig
from bgen.genes.foretell import fit_ridge, left_out_r2
from bgen.models.vae.decoders.state_vector import StateVectorDecoder
from bgen.models.vae.gene_table import GeneTable
from bgen.nn.flops import layers, linear
from bgen.nn.gpu.dropout import keep_mask
from bgen.nn.random import Stream


class GeneTableDecoder(StateVectorDecoder):
    """Latent state to the parameters of the distribution of counts, with rows from a gene table."""

    decayed = ()

    def __init__(self, config: VAEConfig, n_genes: int, covariates: Mapping[str, int]) -> None:
        super().__init__(config, n_genes, covariates)
        assert isinstance(config.decoder, GeneTableDecoderConfig)
        vectors = config.decoder.vectors
        self.genes = GeneTable(n_genes, config.decoder.rows, vectors, learned=vectors is None)
        self.residual_dropout = 0.0 if vectors is None else vectors.residual_dropout
        self.ask = nn.Linear(config.hidden, config.decoder.rows, bias=False)
        nn.init.zeros_(self.ask.weight)  # the start is that of ``state_vector``

    def gene_logits(self, hidden: Tensor, keys: Tensor | None) -> Tensor:
        """See :class:`StateVectorDecoder`."""
        own = self.logits(hidden)
        if self.training and self.residual_dropout > 0:
            assert keys is not None, "dropout in training needs the cells' keys"
            level = self.logits(hidden.new_zeros(1, hidden.shape[1]))
            kept = keep_mask(keys, Stream.RESIDUAL, own.shape[1], 1 - self.residual_dropout)
            own = torch.where(kept | ~self.genes.has_vector, own, level)
        return own + self.ask(hidden) @ self.genes().T

    @property
    def vector_table(self) -> GeneTable | None:
        """See :class:`Decoder`."""
        return None if self.genes.config is None else self.genes

    @torch.no_grad()
    def foretell_genes(self, trained: Tensor, state: Tensor) -> float:
        """See :class:`Decoder`.

        Rows come from the table; levels and dispersions, which training learns gene by gene, from a ridge regression on
        the vectors. A level is foretold where the state is average, so that it holds what rows add there.
        """
        known, there = len(trained), trained & self.genes.has_vector[: len(trained)]
        old, new = (rows.double().numpy() for rows in (self.genes.vectors[:known][there], self.genes.vectors[known:]))
        logits, _, *dropout = (values.double() for values in self(state, {}, None))

        def foretell(numbers: Tensor) -> Tensor:
            return torch.from_numpy(fit_ridge(old, numbers[:known][there].double().numpy())(new))

        self.logits.bias[known:] += foretell(logits[0]) - logits[0, known:]
        self.scaled_log_theta[known:] = foretell(self.scaled_log_theta).float()
        if self.dropout_logits is not None:
            self.dropout_logits.bias[known:] += foretell(dropout[0][0]) - dropout[0][0, known:]
        return left_out_r2(old, logits[0, :known][there].numpy())

    def describe_genes(self, genes: pd.DataFrame) -> list[str]:
        """See :class:`Decoder`."""
        return [f"Decoder. {sentence}" for sentence in self.genes.describe(genes)]

    @torch.no_grad()
    def start_genes(self, known: int, shares: Tensor) -> None:
        """See :class:`Decoder`."""
        super().start_genes(known, shares)
        self.genes.start_genes(known)

    def tables(self, *, genes: bool) -> Iterator[nn.Parameter]:
        """See :class:`Decoder`."""
        yield from super().tables(genes=genes)
        if genes:
            yield from self.genes.tables()

    def flops(self, cells: int) -> int:
        """See :class:`Decoder`."""
        inside = super().flops(cells) - layers(cells, self.genes) + self.genes.flops()
        return inside + linear(cells, self.ask.out_features, self.genes.n_genes)
