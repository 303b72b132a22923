"""The decoder to all genes at once: an MLP, then a softmax over genes and a dispersion of each.

Axes: B cells, G genes, D latent size, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bgen.config.vae import VAEConfig
from bgen.models.vae.covariates import Covariates
from bgen.nn.residual import ResidualBlock

_DISPERSION_SPEED = 10.0
"""Factor between the dispersions' parameter and their logarithm: Adam moves a parameter by the learning rate a step at
most, which would take thousands of steps to get from the start to a gene's own dispersion."""


_START_THETA = 10.0
"""Inverse dispersion that every gene starts with."""


class Decoder(nn.Module):
    """Latent state to the parameters of the distribution of counts."""

    def __init__(self, config: VAEConfig, n_genes: int, covariates: Mapping[str, int]) -> None:
        super().__init__()
        self.stem = nn.Linear(config.latent, config.hidden)
        self.covariates = Covariates(covariates, config.hidden)
        self.blocks = nn.ModuleList(
            ResidualBlock(config.hidden, config.dropout, config.blocks + number, config.recompute)
            for number in range(config.blocks)
        )
        self.norm = nn.LayerNorm(config.hidden)
        self.logits = nn.Linear(config.hidden, n_genes)
        self.dropout_logits = nn.Linear(config.hidden, n_genes) if config.likelihood == "zinb" else None
        self.scaled_log_theta = nn.Parameter(torch.full((n_genes,), math.log(_START_THETA) / _DISPERSION_SPEED))

    @property
    def log_theta(self) -> Tensor:
        """``[G]``: log inverse dispersion of each gene."""
        return self.scaled_log_theta * _DISPERSION_SPEED

    def forward(self, z: Tensor, obs: Mapping[str, Tensor], keys: Tensor | None) -> tuple[Tensor, ...]:
        """Return logits ``[B, G]``, log theta ``[G]`` and, for zinb, dropout logits ``[B, G]`` for ``z [B, D]``.

        Tensors, not an object that holds them: ZeRO 3 finds in a module's output what its gradients come in by.
        """
        hidden = F.silu(self.covariates(self.stem(z), obs))
        for block in self.blocks:
            hidden = block(hidden, keys)
        hidden = self.norm(hidden)
        if self.dropout_logits is None:
            return self.logits(hidden), self.log_theta
        return self.logits(hidden), self.log_theta, self.dropout_logits(hidden)
