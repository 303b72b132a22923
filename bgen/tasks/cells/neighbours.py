"""Nearest neighbours of cells, written where scanpy looks for them: ``sc.tl.umap`` and ``sc.tl.leiden`` go on at once.

Edges are those of UMAP (McInnes, Healy and Melville, 2018, arXiv 1802.03426): a cell's own nearest neighbour has weight
1, and the others less the further they are, by a width of each cell's own.

Axes: N cells, D dimensions, K neighbours without the cell itself.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from bgen.errors import UserError

KEY = "neighbors"
"""Key of uns where scanpy looks unless it is told another."""

BISECTIONS = 64
LEAST_WIDTH = 1e-3
"""Of a cell's width, in units of the mean distance to its neighbours."""


def add_neighbours(cells: AnnData, of: str, k: int) -> None:
    """Write the graph of the ``k`` nearest neighbours in ``obsm[of]``, as ``sc.pp.neighbors(use_rep=of)`` does.

    Distances are Euclidean, and the neighbours are exact: that takes minutes from some 100,000 cells on, for which
    scanpy's own search is made.

    Parameters
    ----------
    cells
        Get ``obsp['distances']``, ``obsp['connectivities']`` (both ``[N, N]``, sparse) and ``uns['neighbors']``, in
        place of what had these names.
    k
        Neighbours of a cell, itself counted, as scanpy's ``n_neighbors``.

    Raises
    ------
    UserError
        If ``k`` is not from 2 to the number of cells.
    """
    from sklearn.neighbors import NearestNeighbors  # slow to import, as all of scikit-learn: only where it is used

    if not 2 <= k <= cells.n_obs:
        raise UserError(f"neighbours, the cell itself counted, are from 2 to the {cells.n_obs:,} cells, not {k}.")
    search = NearestNeighbors(n_neighbors=k - 1).fit(cells.obsm[of])
    distances, places = search.kneighbors()
    starts = np.arange(cells.n_obs + 1) * (k - 1)
    shape = (cells.n_obs, cells.n_obs)
    weights = sp.csr_matrix((weights_of(distances).ravel(), places.ravel(), starts), shape=shape)
    either = sp.csr_matrix(weights + weights.T - weights.multiply(weights.T), dtype=np.float32)
    either.eliminate_zeros()
    cells.obsp["distances"] = sp.csr_matrix((distances.ravel(), places.ravel(), starts), shape=shape)
    cells.obsp["connectivities"] = either
    parameters = {"n_neighbors": k, "method": "umap", "random_state": 0, "metric": "euclidean", "use_rep": of}
    kept = {"connectivities_key": "connectivities", "distances_key": "distances"}
    cells.uns[KEY] = {**kept, "params": parameters}


def weights_of(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weight of each cell's edge to each neighbour, for ``distances [N, K]``.

    The weight is ``exp(-(d - r) / s)`` beyond the distance r of the nearest neighbour that is elsewhere, and 1 within
    it; the width s of each cell is such that its weights sum up to ``log2(K + 1)``.
    """
    elsewhere = np.where(distances > 0, distances, np.inf).min(1, keepdims=True)
    nearest = np.where(np.isfinite(elsewhere), elsewhere, 0.0)
    beyond = np.maximum(distances - nearest, 0.0)
    wanted = np.log2(distances.shape[1] + 1)
    low, high = np.zeros_like(nearest), np.full_like(nearest, np.inf)
    width = np.ones_like(nearest)
    for _ in range(BISECTIONS):
        above = np.exp(-beyond / width).sum(1, keepdims=True) > wanted
        low, high = np.where(above, low, width), np.where(above, width, high)
        width = np.where(np.isfinite(high), (low + high) / 2, 2 * width)
    own = distances.sum(1, keepdims=True) / (distances.shape[1] + 1)
    least = LEAST_WIDTH * np.where(nearest > 0, own, own.mean())
    return np.exp(-beyond / np.maximum(np.maximum(width, least), np.finfo(float).tiny))
