"""Displacement interpolation: the population half-way, with nothing learned (McCann, Adv. Math. 1997).

With the optimal-transport plan P of two populations under the squared distance, and a share s of the way,

    x_s = (1 - s) x_i + s y_j    with probability P_ij

is where the cells would be if each went straight to its partner at constant speed. At s = 1/2 the field calls it the
"OT-midpoint". It ignores noise: averaging two measured cells removes part of the scatter of both.

Axes: N, M cells, K pairs, D dimensions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ITERATIONS = 10_000_000


def transport_plan(
    x: ArrayLike, y: ArrayLike, grown: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """Return pairs ``i [K]``, ``j [K]`` and weights ``[K]`` of the exact plan between ``x [N, D]`` and ``y [M, D]``.

    Cells of a population have equal weight, or those of x the weights ``grown [N]``, which add up to 1; K is at most
    N + M - 1; the weights of the pairs add up to 1.
    """
    import ot  # takes a second, which commands without transport should not wait for

    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    cost = ot.dist(a, b)  # squared distances
    shares = np.full(len(a), 1 / len(a)) if grown is None else grown
    plan = ot.emd(shares, np.full(len(b), 1 / len(b)), cost, numItermax=_ITERATIONS)
    i, j = np.nonzero(plan)
    return i, j, plan[i, j] / plan.sum()


def displace(x: ArrayLike, y: ArrayLike, share: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return points ``[K, D]`` and weights ``[K]``: ``share`` of the way from ``x [N, D]`` to ``y [M, D]``."""
    i, j, weights = displaced_pairs(x, y, share)
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return (1 - share) * a[i] + share * b[j], weights


def displaced_pairs(
    x: ArrayLike, y: ArrayLike, share: float, grown: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """Return the pairs of :func:`transport_plan` with their weights ``[K]`` after a ``share`` of the way.

    With growth r = ``grown [N]`` (:mod:`bgen.flow.growth`) at a constant rate, cell i has come from 1 / N to
    r_i^s (1 / N)^(1 - s): its pairs weigh (1 / (N r_i))^(1 - s) times what they do at the end.
    """
    i, j, weights = transport_plan(x, y, grown)
    if grown is not None:
        weights = weights * (1 / (len(grown) * grown[i])) ** (1 - share)
        weights = weights / weights.sum()
    return i, j, weights


def draw(weights: NDArray[np.float64], n: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Draw ``n`` of K numbers by weight, int ``[n]``; none comes more than one draw too often or too seldom."""
    edges = np.cumsum(weights)
    return np.searchsorted(edges, (np.arange(n) + rng.random()) / n * edges[-1]).clip(max=len(weights) - 1)


def pair(x: ArrayLike, y: ArrayLike) -> NDArray[np.intp]:
    """Return ``j [N]``: the partner in ``y [N, D]`` of each cell of ``x [N, D]``, one to one, at the least cost."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    rows, columns = linear_sum_assignment(cdist(np.asarray(x), np.asarray(y), "sqeuclidean"))
    assert (rows == np.arange(len(rows))).all()
    return np.asarray(columns, dtype=np.intp)
