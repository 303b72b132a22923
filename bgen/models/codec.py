"""The codec: what a flow asks of whatever stands between counts and latents.

A VAE (:mod:`bgen.models.vae.vae`) and plain log counts (:mod:`bgen.models.log_counts`) are such, and model directories
hold either of them.

Axes: B cells, G genes, D size of the latent state; the latents of a cell are D + 1 numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bgen.data.batch import CellBatch
from bgen.models.likelihoods.negative_binomial import NegativeBinomial, ZeroInflatedNegativeBinomial
from bgen.models.vae.levels import LevelStats
from bgen.models.vae.whitening import WhiteningStats

_LIBRARY_MARGIN = 0.1
"""Natural-log units by which a generated library may lie outside the range seen in training."""


class Codec(nn.Module, ABC):
    """Counts to whitened latents, and back to distributions of counts.

    Whitened latents are the latent state and, last, the log library size, each standardised by statistics of the
    training cells. These are buffers: ``latent_mean``, ``latent_std`` ``[D + 1]``, ``log_library_range [2]``.

    Parameters
    ----------
    latent
        D.
    n_genes
        G.
    covariates
        Number of categories of each obs column that :meth:`decode` is told.
    """

    latent_mean: Tensor
    latent_std: Tensor
    log_library_range: Tensor

    def __init__(self, latent: int, n_genes: int, covariates: Mapping[str, int]) -> None:
        super().__init__()
        self.size = latent + 1
        self.n_genes = n_genes
        self.covariates = dict(covariates)
        self.register_buffer("latent_mean", torch.zeros(self.size))
        self.register_buffer("latent_std", torch.ones(self.size))
        self.register_buffer("log_library_range", torch.tensor([-torch.inf, torch.inf]))

    @property
    def device(self) -> torch.device:
        """Where the codec is."""
        return self.latent_mean.device

    @abstractmethod
    def latents(self, batch: CellBatch) -> Tensor:
        """Return whitened latents of cells, ``[B, D + 1]``, without gradients; all randomness comes from
        ``batch.keys``.
        """

    @abstractmethod
    def decode(
        self, z: Tensor, library: Tensor, covariates: Mapping[str, Tensor], keys: Tensor | None = None
    ) -> NegativeBinomial | ZeroInflatedNegativeBinomial:
        """Return the distribution of counts for states ``z [B, D]`` and total counts ``library [B]``.

        ``covariates`` are codes ``[B]`` by column; an absent column counts as unknown. ``keys [B]`` are needed in
        training mode only, for dropout.
        """

    @abstractmethod
    def latents_flops(self, cells: int, nonzeros: int) -> int:
        """Floating-point operations of :meth:`latents` for so many cells with so many stored counts in all."""

    def whiten(self, z: Tensor, log_library: Tensor) -> Tensor:
        """Standardise states ``z [B, D]`` and log total counts ``[B]``: ``[B, D + 1]``."""
        return (torch.cat((z, log_library[:, None]), dim=1) - self.latent_mean) / self.latent_std

    def unwhiten(self, whitened: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of :meth:`whiten`; the log library is limited to the range of the training cells plus 0.1."""
        x = whitened * self.latent_std + self.latent_mean
        low, high = self.log_library_range
        return x[:, :-1], x[:, -1].clamp(low - _LIBRARY_MARGIN, high + _LIBRARY_MARGIN)

    def whiten_state(self, z: Tensor) -> Tensor:
        """Standardise states ``z [..., D]`` alone."""
        return (z - self.latent_mean[:-1]) / self.latent_std[:-1]

    def whiten_library(self, log_library: Tensor) -> Tensor:
        """Standardise log total counts ``[...]`` alone."""
        return (log_library - self.latent_mean[-1]) / self.latent_std[-1]


class CountsCodec(Codec):
    """A codec that a model directory can hold: it also encodes a user's cells, and is fitted to training cells.

    See :class:`Codec` for the parameters.
    """

    @abstractmethod
    def encode(self, batch: CellBatch) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the states of cells, ``[B, D]`` each; -inf where there is no variance."""

    @abstractmethod
    def states(self, batch: CellBatch) -> Tensor:
        """Return a draw from the states of each cell, ``[B, D]``, keyed by ``batch.keys``."""

    @abstractmethod
    def shift_genes(self, by: Tensor) -> None:
        """Move the genes' logits in :meth:`decode` by ``[G]``, whatever the state."""

    @torch.no_grad()
    def latents(self, batch: CellBatch) -> Tensor:
        """See :class:`Codec`: of drawn states."""
        return self.whiten(self.states(batch), log_library(batch))

    def whitening_stats(self) -> WhiteningStats:
        """Empty statistics of the right size, on this model's device."""
        return WhiteningStats(self.size - 1, self.latent_mean.device)

    @torch.no_grad()
    def accumulate_whitening(self, stats: WhiteningStats, batch: CellBatch) -> None:
        """Add drawn states of a batch to ``stats``; draws, not means, since the flow learns the aggregate posterior."""
        stats.add(self.states(batch), log_library(batch))

    def fit_whitening(self, stats: WhiteningStats) -> None:
        """Store the statistics, already reduced over ranks, in the buffers."""
        mean, std, bounds = stats.finish()
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)
        self.log_library_range.copy_(bounds)

    def level_stats(self) -> LevelStats:
        """Empty statistics of the right size, on this model's device."""
        return LevelStats(self.n_genes, self.latent_mean.device)

    @torch.no_grad()
    def accumulate_generated_levels(self, stats: LevelStats, batch: CellBatch, whitened: Tensor) -> None:
        """Add a batch to ``stats``, and beside each cell one of its covariates that was generated: ``[B, D + 1]``."""
        z, size = self.unwhiten(whitened)
        stats.compare(batch, self.decode(z, size.exp(), batch.obs), batch.keys)

    def fit_levels(self, stats: LevelStats) -> None:
        """Move the genes by one Newton step of ``stats``, already reduced over ranks."""
        self.shift_genes(stats.step())


def log_library(batch: CellBatch) -> Tensor:
    """Log total counts ``[B]``; a cell without counts is taken to have one."""
    return batch.library.clamp_min(1.0).log()
