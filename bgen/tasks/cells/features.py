"""What a classifier of cells may see: the model's latent states, principal components, or the most variable genes.

Axes: N cells, n of them, G genes, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.evaluate.metrics.counts import variable_genes
from bgen.evaluate.metrics.space import fit_space
from bgen.genes.expression import log_cp10k

LATENTS, COMPONENTS, GENES = "latent states", "principal components", "variable genes"

MOST_GENES = 2_000
CLIPPED = 10.0
"""Standard deviations beyond which a gene's expression is no further away."""

BLOCK = 8_192
"""Cells whose features are made at once."""


@dataclass(frozen=True)
class Features:
    """Features ``[n, D]``, float32, of the cells numbered ``rows [n]``.

    Attributes
    ----------
    name
        One of the three above.
    of
        From rows to features.
    """

    name: str
    of: Callable[[I64], NDArray[np.float32]]

    def blocks(self, cells: int) -> Iterator[NDArray[np.float32]]:
        """Yield the features of all cells, some at a time."""
        for first in range(0, cells, BLOCK):
            yield self.of(np.arange(first, min(first + BLOCK, cells)))


def latent_features(latents: NDArray[np.float32]) -> Features:
    """Return whitened latents ``[N, D]`` as features."""
    return Features(LATENTS, lambda rows: latents[rows])


def component_features(counts: sp.csr_matrix) -> Features:
    """Return the principal components of counts ``[N, G]``, each at unit variance."""
    points = fit_space(counts).project(counts)
    points /= np.maximum(points.std(0), 1e-6)
    return Features(COMPONENTS, lambda rows: points[rows])


def gene_features(counts: sp.csr_matrix) -> Features:
    """Return log expression of the genes of counts ``[N, G]`` that vary most, standardised."""
    genes = variable_genes(counts, MOST_GENES)
    logs = log_cp10k(counts)[:, genes]
    mean = np.asarray(logs.mean(0)).ravel()
    variance = np.asarray(logs.multiply(logs).mean(0)).ravel() - mean**2
    scale = np.sqrt(np.maximum(variance, 1e-12))

    def of(rows: I64) -> NDArray[np.float32]:
        standard = (logs[rows].toarray() - mean) / scale
        return np.clip(standard, -CLIPPED, CLIPPED).astype(np.float32)

    return Features(GENES, of)
