"""The encoder of a cell as one state vector: log-normalised counts of all genes, through an MLP.

Axes: B cells, G genes, D latent size, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.models.vae.covariates import Covariates
from bgen.models.vae.sparse_linear import log_normalise, sparse_matmul
from bgen.nn.residual import ResidualBlock

SCALE = 10_000.0
"""Counts per cell to which the encoder's input is normalised before log1p."""


class Encoder(nn.Module):
    """Sparse log-normalised counts to the mean and log-variance of the latent state."""

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
        """Return mean and log-variance ``[B, D]`` in float32; ``counts [NNZ]`` stand in for the batch's own."""
        hidden = sparse_matmul(self.weight, batch, log_normalise(batch, counts, SCALE)) + self.bias
        hidden = F.silu(self.covariates(hidden, batch.obs))
        for block in self.blocks:
            hidden = block(hidden, batch.keys)
        mean, logvar = self.head(self.norm(hidden)).float().chunk(2, dim=1)
        return mean, logvar.clamp(-12.0, 8.0)
