"""The decoder to all genes at once: an MLP, then a softmax over genes and a dispersion of each.

Axes: B cells, G genes, D latent size, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bgen.config.vae import VAEConfig
from bgen.models.vae.covariates import Covariates
from bgen.models.vae.decoders.decoder import Decoder
from bgen.nn.flops import layers
from bgen.nn.residual import ResidualBlock

_DISPERSION_SPEED = 10.0
"""Factor between the parameter of dispersions and their logarithm. Adam moves a parameter by at most the learning rate
a step, so without it a gene would need thousands of steps to reach its own dispersion.
"""


_START_THETA = 10.0
"""Inverse dispersion that every gene starts with."""


class StateVectorDecoder(Decoder):
    """Latent state to the parameters of the distribution of counts."""

    decayed = ()

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
        """See :class:`Decoder`."""
        return self.scaled_log_theta * _DISPERSION_SPEED

    def forward(self, z: Tensor, obs: Mapping[str, Tensor], keys: Tensor | None) -> tuple[Tensor, ...]:
        """See :class:`Decoder`."""
        hidden = F.silu(self.covariates(self.stem(z), obs))
        for block in self.blocks:
            hidden = block(hidden, keys)
        hidden = self.norm(hidden)
        if self.dropout_logits is None:
            return self.gene_logits(hidden, keys), self.log_theta
        return self.gene_logits(hidden, keys), self.log_theta, self.dropout_logits(hidden)

    def gene_logits(self, hidden: Tensor, keys: Tensor | None) -> Tensor:
        """Return the logits of the genes' shares ``[B, G]`` from the last layer ``[B, H]``; a decoder derived from this
        one may need ``keys [B]``.
        """
        return self.logits(hidden)

    @torch.no_grad()
    def initialise_genes(self, mean_counts: Tensor) -> None:
        """See :class:`Decoder`. Without it the first hundreds of steps go into learning which genes are abundant."""
        proportions = mean_counts.to(self.logits.bias).clamp_min(0) + 1e-8 * mean_counts.sum()
        self.logits.bias.copy_(proportions.log() - proportions.log().mean())

    @torch.no_grad()
    def shift_genes(self, shifts: Tensor) -> None:
        """See :class:`Decoder`."""
        self.logits.bias.add_(shifts)

    @torch.no_grad()
    def start_genes(self, known: int, shares: Tensor) -> None:
        """See :class:`Decoder`.

        The logits of a gene vary over states, so the share is right only on average; training does the rest.
        """
        self.logits.weight[known:] = 0
        self.logits.bias[known:] = self.logits.bias[:known].logsumexp(0) + shares.log()
        self.scaled_log_theta[known:] = self.scaled_log_theta[:known].median()
        if self.dropout_logits is not None:
            self.dropout_logits.weight[known:] = 0
            self.dropout_logits.bias[known:] = self.dropout_logits.bias[:known].median()

    def tables(self, *, genes: bool) -> Iterator[nn.Parameter]:
        """See :class:`Decoder`."""
        yield from self.covariates.parameters()
        yield self.scaled_log_theta
        if genes:
            yield from self.logits.parameters()
        else:
            yield self.logits.bias

    def flops(self, cells: int) -> int:
        """See :class:`Decoder`: it is dense over all genes."""
        return layers(cells, self)
