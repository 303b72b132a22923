"""The codec: what a flow asks of a model between counts and latents, such as a VAE (:mod:`bgen.models.vae.vae`).

Axes: B cells, G genes, D size of the latent state; the latents of a cell are D + 1 numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bgen.data.batch import CellBatch
from bgen.models.likelihoods.negative_binomial import NegativeBinomial, ZeroInflatedNegativeBinomial

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


def log_library(batch: CellBatch) -> Tensor:
    """Log total counts ``[B]``; a cell without counts is taken to have one."""
    return batch.library.clamp_min(1.0).log()
