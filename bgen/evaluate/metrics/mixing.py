"""How well batches mix in an embedding.

Axes: N cells, D components.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

NEIGHBOURS = 15


def batch_mixing(points: NDArray[np.float32], batches: ArrayLike) -> float:
    """Return the share of nearest neighbours that are of another batch, relative to perfect mixing.

    1 is perfectly mixed, 0 fully apart. ``points [N, D]``, ``batches [N]``; dimensions count as they are scaled. High
    mixing alone means little: an embedding that holds nothing mixes best, so look at a biological label beside it.
    """
    from sklearn.neighbors import NearestNeighbors  # slow to import, as all of scikit-learn: only where it is used

    names = np.asarray(batches).astype(str)
    _, codes, numbers = np.unique(names, return_inverse=True, return_counts=True)
    k = min(NEIGHBOURS, len(names) - 1)
    _, neighbours = NearestNeighbors(n_neighbors=k + 1).fit(points).kneighbors(points)
    other = (codes[neighbours[:, 1:]] != codes[:, None]).mean(1)
    expected = (len(names) - numbers[codes]) / (len(names) - 1)
    return float(other.mean() / expected.mean())
