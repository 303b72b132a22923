"""What a classifier of cells may see: the model's latent states, principal components, or the most variable genes.

Features are fitted to some cells and made of any others, so that cells may come a block at a time.

Axes: N cells that they are fitted to, n cells that they are made of, G genes, D features or latent size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.evaluate.metrics.counts import variable_genes
from bgen.evaluate.metrics.space import Space, fit_space
from bgen.genes.expression import log_cp10k

MOST_GENES = 2_000
CLIPPED = 10.0
"""Standard deviations beyond which a gene's expression is no further away."""

BLOCK = 8_192
"""Cells whose features are made at once."""


class Features(ABC):
    """Features of cells; ``name`` is what users are told."""

    name: str

    @abstractmethod
    def of(self, counts: sp.csr_matrix, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return features ``[n, D]`` of cells with counts ``[n, G]`` and whitened latents ``[n, D]``."""


class LatentFeatures(Features):
    """Whitened latent states as they are."""

    name = "latent states"

    def of(self, counts: sp.csr_matrix, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """See :class:`Features`."""
        return latents


@dataclass(frozen=True)
class ComponentFeatures(Features):
    """Principal components, each divided by its ``scale [D]``."""

    space: Space
    scale: NDArray[np.float32]
    name = "principal components"

    @classmethod
    def fit(cls, counts: sp.csr_matrix) -> ComponentFeatures:
        """Fit to cells with counts ``[N, G]``, which have variance 1 in each component."""
        space = fit_space(counts)
        return cls(space, np.maximum(space.project(counts).std(0), 1e-6))

    def of(self, counts: sp.csr_matrix, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """See :class:`Features`."""
        return self.space.project(counts) / self.scale


@dataclass(frozen=True)
class GeneFeatures(Features):
    """Log expression of ``genes [D]``, standardised by ``mean`` and ``scale`` ``[D]``."""

    genes: NDArray[np.intp]
    mean: NDArray[Any]
    scale: NDArray[Any]
    name = "variable genes"

    @classmethod
    def fit(cls, counts: sp.csr_matrix) -> GeneFeatures:
        """Fit to cells with counts ``[N, G]``: the genes that vary most among them."""
        genes = variable_genes(counts, MOST_GENES)
        logs = log_cp10k(counts)[:, genes]
        mean = np.asarray(logs.mean(0)).ravel()
        variance = np.asarray(logs.multiply(logs).mean(0)).ravel() - mean**2
        return cls(genes, mean, np.sqrt(np.maximum(variance, 1e-12)))

    def of(self, counts: sp.csr_matrix, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """See :class:`Features`."""
        standard = (log_cp10k(counts)[:, self.genes].toarray() - self.mean) / self.scale
        return np.clip(standard, -CLIPPED, CLIPPED).astype(np.float32)
