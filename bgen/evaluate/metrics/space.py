"""The frozen embedding in which distributions of cells are compared.

Counts are scaled to 10,000 per cell, log1p is taken, and the result is projected on the principal components of the
*training* cells: centred on the training mean, whatever is projected. Fitting on test or generated cells, or projecting
without the mean, makes distances between models incomparable.

Axes: N cells, G genes, D components.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from bgen.genes.expression import log_cp10k

COMPONENTS = 30


@dataclass(frozen=True)
class Space:
    """Principal components of training cells; made by :func:`fit_space`.

    components: float32 [D, G], orthonormal rows in order of explained variance.
    origin: float32 [D], the projection of the training mean, which is subtracted from every projected cell.
    """

    components: NDArray[np.float32]
    origin: NDArray[np.float32]

    def project(self, counts: sparse.csr_matrix) -> NDArray[np.float32]:
        """Return the coordinates of cells given by raw counts [N, G], float32 [N, D]."""
        if counts.shape[1] != self.components.shape[1]:
            raise ValueError(f"the space was fitted on {self.components.shape[1]} genes, not {counts.shape[1]}")
        return np.asarray(log_cp10k(counts) @ self.components.T) - self.origin


def fit_space(train: sparse.csr_matrix, components: int = COMPONENTS) -> Space:
    """Fit the embedding on raw counts of training cells [N, G].

    ARPACK needs products with the matrix only, so the centring stays implicit and no dense N x G array is made. The
    starting vector is fixed: the same cells give the same space. With fewer than ``components`` + 1 cells or genes
    there are as many components as exist.
    """
    count = min(components, min(train.shape) - 1)
    if count < 1:
        raise ValueError(f"principal components need at least two cells and two genes, got {train.shape}")
    from sklearn.decomposition import PCA

    pca = PCA(n_components=count, svd_solver="arpack", random_state=0).fit(log_cp10k(train))
    axes = np.asarray(pca.components_, dtype=np.float32)
    return Space(components=axes, origin=(axes @ np.asarray(pca.mean_, dtype=np.float32).ravel()).astype(np.float32))
