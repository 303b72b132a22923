"""Counts on a common scale, and how genes vary together.

Axes: N cells, G genes, E components.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

TARGET_SUM = 1e4
LEAST_SPREAD = 1e-3
"""Standard deviation of a logarithm that a gene is taken to have at least."""


def library_size(counts: sparse.csr_matrix) -> NDArray[np.float64]:
    """Return the total count of each cell, float64 [N]."""
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()


def log_cp10k(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return log(1 + 10,000 * counts / library size), sparse float32 [N, G]; a cell without counts stays zero."""
    library = library_size(counts)
    scale = np.divide(TARGET_SUM, library, out=np.zeros_like(library), where=library > 0)
    per_entry = np.repeat(scale, np.diff(counts.indptr))
    data = np.log1p(counts.data * per_entry).astype(np.float32)
    return sparse.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)


def coexpression_rows(counts: sparse.csr_matrix, components: int) -> NDArray[np.float32]:
    """Return a row ``[G, E]`` for each gene: its correlation with the principal components of cells ``[N, G]``.

    Genes that vary together have similar rows, of root mean square norm up to sqrt(E); a gene that is not expressed has
    zeros. The products of ARPACK see the sparse matrix only, with the centring implicit.
    """
    from scipy.sparse.linalg import LinearOperator, svds  # half a second

    logs = log_cp10k(counts)
    N, G = logs.shape
    rows = np.zeros((G, components), np.float32)
    count = min(components, min(N, G) - 1)
    if count < 1:
        return rows
    mean = np.asarray(logs.mean(0, dtype=np.float64)).ravel()
    deviation = np.sqrt(np.maximum(np.asarray(logs.multiply(logs).mean(0)).ravel() - mean**2, 0))
    centred = LinearOperator(
        (N, G),
        matvec=lambda x: logs @ x.ravel() - mean @ x.ravel(),
        rmatvec=lambda y: logs.T @ y.ravel() - mean * y.sum(),
        dtype=np.float64,
    )
    start = np.random.default_rng(0).standard_normal(min(N, G))
    _, size, axes = svds(centred, k=count, v0=start)
    order = np.argsort(-size)
    axes = axes[order] * np.sign(axes[order].sum(1))[:, None]
    spread = size[order] / np.sqrt(N)
    rows[:, :count] = (axes * spread[:, None] / np.maximum(deviation, LEAST_SPREAD)).T * np.sqrt(components)
    return rows
