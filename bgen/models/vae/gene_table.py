"""The gene table: a row for each gene, from which keys and values of attention, or rows of a decoder, are made.

    e_g = LN(r_g + W f_g)

with r_g learned for each gene, and f_g a fixed vector of what is known of it by name (bgen/genes/vector_map.py). Either
may be absent. Training now and then takes r_g away from whole genes, so that W learns to stand alone, as it must for
genes that training never saw.

Axes: G genes, E width of a row, F size of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bgen.config.gene_set import VectorsConfig
from bgen.errors import UserError
from bgen.genes.vector_map import VectorMap, fit_vectors
from bgen.nn.flops import layers
from bgen.nn.gpu.draws import uniform
from bgen.nn.precision import without_autocast
from bgen.nn.random import Stream

_START = 0.05
"""Spread that rows start with: below the root of _EPS, so that a gene says little until it has been learned."""

_EPS = 1e-2
"""Added to the variance of a row: a new gene's row of zeros stays zero, and its gradient is not out of proportion."""


class GeneTable(nn.Module):
    """Rows of genes, normalised, ``[G, E]``.

    Learned rows decay on purpose: those of genes that are hardly ever seen should say little, and where there are
    vectors they are what the vectors do not tell.

    Parameters
    ----------
    n_genes
        G.
    width
        E.
    config
        Vectors; None: there are none.
    learned
        Whether there are rows r_g.

    Attributes
    ----------
    map
        How vectors of further genes are made; None: there are none, or the model does not say.
    """

    decayed = ("residual",)
    vectors: Tensor
    has_vector: Tensor

    def __init__(self, n_genes: int, width: int, config: VectorsConfig | None = None, *, learned: bool = True) -> None:
        super().__init__()
        self.n_genes, self.config = n_genes, config
        self.residual = nn.Parameter(_START * torch.randn(n_genes, width)) if learned else None
        self.of_vector = None
        self.map: VectorMap | None = None
        if config is not None:
            self.of_vector = nn.Linear(config.size, width, bias=False)
            self.register_buffer("vectors", torch.zeros(n_genes, config.size))
            self.register_buffer("has_vector", torch.zeros(n_genes, dtype=torch.bool))

    def forward(self, step: int = 0) -> Tensor:
        """Return the rows ``[G, E]``; in training some are made from vectors alone, by draws keyed by the step."""
        some = next(self.parameters())
        with without_autocast(some):
            row: Tensor | None = self.residual
            if row is not None and self.config is not None and self.training and self.config.residual_dropout > 0:
                key = torch.full((1,), step, device=some.device)
                drawn = uniform(key, Stream.RESIDUAL, self.n_genes)[0] < self.config.residual_dropout
                row = torch.where((drawn & self.has_vector)[:, None], 0.0, row)
            if self.of_vector is not None:
                known = self.of_vector(self.vectors.to(some.dtype))
                row = known if row is None else row + known
            assert row is not None, "a table has learned rows or vectors"
            return F.layer_norm(row, row.shape[1:], eps=_EPS)

    def describe(self, genes: pd.DataFrame) -> list[str]:
        """Read what is known of genes by name; return how many have a vector, as a sentence.

        Raises
        ------
        UserError
            If a file that is named cannot be used, or none is named.
        """
        if self.config is None:
            return []
        if not self.config.files and self.config.sets is None:
            raise UserError("vectors: training needs files of vectors (vectors.files) or gene sets (vectors.sets).")
        values, self.map = fit_vectors(self.config, genes)
        known = values.any(1)
        self.vectors.copy_(torch.from_numpy(values))
        self.has_vector.copy_(torch.from_numpy(known))
        return [f"Vectors: known of {int(known.sum()):,} of the {len(genes):,} genes ({known.mean():.0%})."]

    @torch.no_grad()
    def tell(self, known: int, vectors: Tensor) -> None:
        """Give all but the first ``known`` genes their vectors ``[N, F]``; a row of zeros says nothing."""
        self.vectors[known:] = vectors
        self.has_vector[known:] = vectors.any(1)

    @torch.no_grad()
    def start_genes(self, known: int) -> None:
        """Let the learned rows of all but the first ``known`` genes start at zero."""
        if self.residual is not None:
            self.residual[known:] = 0

    def tables(self) -> Iterator[nn.Parameter]:
        """Yield the parameters with a row per gene."""
        if self.residual is not None:
            yield self.residual

    def flops(self) -> int:
        """Floating-point operations of the forward pass."""
        return layers(self.n_genes, self)
