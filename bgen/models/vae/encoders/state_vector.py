"""The encoder of a cell as one state vector: log-normalised counts of all genes, through an MLP.

Axes: B cells, G genes, D latent size, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.models.vae.covariates import Covariates
from bgen.models.vae.encoders.encoder import Encoder
from bgen.models.vae.sparse_linear import log_normalised_matmul
from bgen.nn.flops import layers, linear
from bgen.nn.residual import ResidualBlock

SCALE = 10_000.0
"""Counts per cell to which the encoder's input is normalised before log1p."""


class StateVectorEncoder(Encoder):
    """Sparse log-normalised counts to the mean and log-variance of the latent state."""

    decayed = ("weight",)
    compiles = ("read_out",)

    def __init__(self, config: VAEConfig, n_genes: int, covariates: Mapping[str, int]) -> None:
        super().__init__()
        bound = 1 / math.sqrt(n_genes)
        self.weight = nn.Parameter(torch.empty(n_genes, config.hidden).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(config.hidden))
        self.covariates = Covariates(covariates, config.hidden)
        self.blocks = nn.ModuleList(
            ResidualBlock(config.hidden, config.dropout, number, config.recompute) for number in range(config.blocks)
        )
        self.norm = nn.LayerNorm(config.hidden)
        self.head = nn.Linear(config.hidden, 2 * config.latent)

    def forward(self, batch: CellBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Encoder`."""
        hidden = log_normalised_matmul(self.weight, batch, counts, SCALE) + self.bias
        hidden = F.silu(self.covariates(hidden, batch.obs))
        for block in self.blocks:
            hidden = block(hidden, batch.keys)
        return self.read_out(hidden)

    def read_out(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance ``[B, D]`` from the last layer ``[B, H]``."""
        mean, logvar = self.head(self.norm(hidden)).float().chunk(2, dim=1)
        return mean, logvar.clamp(-12.0, 8.0)

    @torch.no_grad()
    def start_genes(self, known: int) -> None:
        """See :class:`Encoder`."""
        self.weight[known:] = 0

    def tables(self, *, genes: bool) -> Iterator[nn.Parameter]:
        """See :class:`Encoder`."""
        yield from self.covariates.parameters()
        if genes:
            yield self.weight

    def flops(self, cells: int, nonzeros: int) -> int:
        """See :class:`Encoder`: the first layer multiplies only where there is a count."""
        return self._first_layer(nonzeros) + layers(cells, self.blocks, self.head)

    def training_flops(self, cells: int, nonzeros: int) -> int:
        """See :class:`Encoder`: the counts need no gradient."""
        return 3 * self.flops(cells, nonzeros) - self._first_layer(nonzeros)

    def _first_layer(self, nonzeros: int) -> int:
        return linear(nonzeros, 1, self.head.in_features)
