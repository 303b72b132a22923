"""How far apart two populations of cells are, from equally many samples of each.

Every function takes the coordinates ``real`` and ``generated``, both [N, D] with the same N. All these estimates depend
on N (exact W2 is biased upwards, the k-NN manifolds shrink), so unequal sizes are an error and figures may be compared
at the same N only.

Symbols: x_i real cells, y_j generated cells, d the Euclidean distance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist, pdist

from bgen.evaluate.metrics.metric import Metric

NEIGHBOURS = 5
_EMD_ITERATIONS = 10_000_000


@dataclass(frozen=True, eq=False)
class Points:
    """Equally many real and other cells, as coordinates ``[N, D]`` in one embedding.

    Attributes
    ----------
    real, other
        Cells of the same place belong together where the populations were matched, as by type.
    """

    real: NDArray[Any]
    other: NDArray[Any]

    @cached_property
    def within_real(self) -> NDArray[np.float64]:
        """Distances between real cells, ``[N, N]``."""
        x, _ = self._checked
        return cdist(x, x)

    @cached_property
    def within_other(self) -> NDArray[np.float64]:
        """Distances between other cells, ``[N, N]``."""
        _, y = self._checked
        return cdist(y, y)

    @cached_property
    def between(self) -> NDArray[np.float64]:
        """Distances from real cells (rows) to others, ``[N, N]``."""
        return cdist(*self._checked)

    @cached_property
    def precision_recall(self) -> tuple[float, float]:
        """See :func:`precision_recall`."""
        return _precision_recall(self, NEIGHBOURS)

    @cached_property
    def _checked(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return _equal_samples(self.real, self.other)

    def take(self, rows: NDArray[np.intp]) -> Self:
        """Return the cells of some places, on both sides; what was computed of single cells or pairs is kept."""
        part = replace(self, **self.fields_of(rows))
        for name in ("within_real", "within_other", "between"):
            if name in self.__dict__:
                part.__dict__[name] = self.__dict__[name][np.ix_(rows, rows)]
        return part

    def with_distances_of(self, points: Points) -> Self:
        """Return this evidence with the distances of the same cells, so that they need not be computed again."""
        for name in ("within_real", "within_other", "between"):
            self.__dict__[name] = getattr(points, name)
        return self

    def fields_of(self, rows: NDArray[np.intp]) -> dict[str, Any]:
        """Return the fields that hold something of each cell, for the cells of some places."""
        return {"real": self.real[rows], "other": self.other[rows]}


@dataclass(frozen=True, eq=False)
class Populations(Points):
    """Points with the bandwidth of a kernel, in the coordinates' units."""

    bandwidth: float


def wasserstein2(real: ArrayLike, generated: ArrayLike) -> float:
    """Return the exact 2-Wasserstein distance.

    W2 = sqrt( min over couplings P of sum_ij P_ij d(x_i, y_j)^2 ), uniform weights 1/N. The coupling is found by the
    network simplex of POT (Bonneel et al., SIGGRAPH Asia 2011; Flamary et al., JMLR 2021). In coordinates' units.
    """
    return transport(_points(real, generated).between, 2)


def wasserstein1(real: ArrayLike, generated: ArrayLike) -> float:
    """Return the exact 1-Wasserstein distance: min over couplings P of sum_ij P_ij d(x_i, y_j). In coordinates' units.

    The figure that trajectory benchmarks report; see :func:`wasserstein2`.
    """
    return transport(_points(real, generated).between, 1)


def median_bandwidth(points: ArrayLike) -> float:
    """Return the median Euclidean distance between two different points (Gretton et al., JMLR 2012, section 8)."""
    median = float(np.median(pdist(np.asarray(points, dtype=np.float64))))
    if median == 0:
        raise ValueError("more than half of the points coincide: the median heuristic gives no bandwidth")
    return median


def mmd2(real: ArrayLike, generated: ArrayLike, bandwidth: float) -> float:
    """Return the unbiased estimate of the squared maximum mean discrepancy with a Gaussian kernel.

    MMD^2 = mean_{i != i'} k(x_i, x_i') + mean_{j != j'} k(y_j, y_j') - 2 mean_ij k(x_i, y_j),
    k(a, b) = exp(-d(a, b)^2 / (2 bandwidth^2)): the U-statistic of Gretton et al., JMLR 2012, lemma 6. Its expectation
    is 0 for equal distributions, so single values may be slightly negative.
    """
    return _mmd2(_points(real, generated), bandwidth)


def energy_distance(real: ArrayLike, generated: ArrayLike) -> float:
    """Return the unbiased estimate of the energy distance.

    E = 2 mean_ij d(x_i, y_j) - mean_{i != i'} d(x_i, x_i') - mean_{j != j'} d(y_j, y_j')
    (Szekely and Rizzo, J. Stat. Plan. Inference 2013), with the plain distance: its square would see means only. Not
    square-rooted; 0 in expectation for equal distributions. In coordinates' units.
    """
    points = _points(real, generated)
    return energy(points.within_real, points.within_other, points.between)


def nearest_neighbour_accuracy(real: ArrayLike, generated: ArrayLike) -> float:
    """Return the leave-one-out accuracy of a 1-nearest-neighbour classifier that tells real from generated.

    Lopez-Paz and Oquab, ICLR 2017. 0.5 is best; 1 means fully separable; below 0.5 each cell's neighbour tends to be of
    the other kind, as when training cells are copied. Neighbours at equal distance share the vote.
    """
    return _nearest_neighbour_accuracy(_points(real, generated))


def precision_recall(real: ArrayLike, generated: ArrayLike, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Return improved precision and recall (Kynkaanniemi et al., NeurIPS 2019).

    A population's manifold is the union of balls around its cells, each reaching to its k-th nearest neighbour in that
    population. Precision: share of generated cells on the real manifold (are they realistic?). Recall: share of real
    cells on the generated manifold (is everything covered?).
    """
    return _precision_recall(_points(real, generated), k)


def transport(distances: NDArray[np.float64], power: int) -> float:
    """Return the exact Wasserstein distance of order 1 or 2 of uniform weights, from distances ``[N, N]``."""
    weights = np.full(len(distances), 1.0 / len(distances))
    import ot

    cost = float(ot.emd2(weights, weights, distances**power, numItermax=_EMD_ITERATIONS))
    return float(max(cost, 0.0) ** (1 / power))


def energy(within_x: NDArray[np.float64], within_y: NDArray[np.float64], between: NDArray[np.float64]) -> float:
    """Return the unbiased energy distance from the distances within and between, each ``[N, N]``."""
    pairs = len(between) * (len(between) - 1)
    return float(2.0 * between.mean() - (within_x.sum() + within_y.sum()) / pairs)


def _mmd2(p: Points, bandwidth: float) -> float:
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, not {bandwidth}")
    gamma = 1.0 / (2.0 * bandwidth**2)
    n = len(p.between)
    # The diagonal of a distance within is 0, its kernel 1.
    within = sum(float(np.exp(-gamma * d**2).sum()) - n for d in (p.within_real, p.within_other)) / (n * (n - 1))
    return float(within - 2.0 * np.exp(-gamma * p.between**2).mean())


def _nearest_neighbour_accuracy(p: Points) -> float:
    shares = []
    for within, between in ((p.within_real, p.between), (p.within_other, p.between.T)):
        others = within.copy()
        np.fill_diagonal(others, np.inf)
        nearest = np.minimum(others.min(axis=1), between.min(axis=1))[:, None]
        same, other = (others <= nearest).sum(axis=1), (between <= nearest).sum(axis=1)
        shares.append(same / (same + other))
    return float(np.concatenate(shares).mean())


def _precision_recall(p: Points, k: int) -> tuple[float, float]:
    n = len(p.between)
    if not 1 <= k < n:
        raise ValueError(f"k = {k} needs more than {k} cells in each population, got {n}")
    # Column 0 of the partition is the point itself, at distance 0.
    radius_real, radius_other = (np.partition(d, k, axis=1)[:, k] for d in (p.within_real, p.within_other))
    precision = (p.between <= radius_real[:, None]).any(axis=0).mean()
    recall = (p.between <= radius_other[None, :]).any(axis=1).mean()
    return float(precision), float(recall)


def _points(real: ArrayLike, generated: ArrayLike) -> Points:
    return Points(*_equal_samples(real, generated))


def _equal_samples(real: ArrayLike, generated: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(real, dtype=np.float64), np.asarray(generated, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected two [N, D] arrays with the same D, got {x.shape} and {y.shape}")
    if len(x) != len(y):
        raise ValueError(f"populations must have the same number of cells, got {len(x)} and {len(y)}: subsample one")
    if len(x) < 2:
        raise ValueError("populations need at least two cells each")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("coordinates must be finite")
    return x, y


METRICS: tuple[Metric[Populations], ...] = (
    Metric[Points](
        "w1",
        "1-Wasserstein",
        "lower",
        3,
        "Mean distance that cells must be moved in the embedding.",
        lambda p: transport(p.between, 1),
        0.05,
        relative=True,
    ),
    Metric[Points](
        "w2",
        "2-Wasserstein",
        "lower",
        3,
        "Least effort of moving generated cells onto real ones in the embedding.",
        lambda p: transport(p.between, 2),
        0.05,
        relative=True,
    ),
    Metric[Populations](
        "mmd2",
        "MMD² (RBF)",
        "lower",
        4,
        "Difference of the two densities at one typical length scale; about 0 if equal.",
        lambda p: _mmd2(p, p.bandwidth),
        0.002,
    ),
    Metric[Points](
        "energy",
        "energy distance",
        "lower",
        3,
        "Difference of the two distributions at all scales; about 0 if equal.",
        lambda p: energy(p.within_real, p.within_other, p.between),
        0.08,
    ),
    Metric[Points](
        "nn_accuracy",
        "1-NN accuracy",
        "half",
        3,
        "How often a cell's nearest neighbour gives away which set it is in.",
        _nearest_neighbour_accuracy,
        0.06,
    ),
    Metric[Points](
        "precision",
        "precision",
        "higher",
        3,
        "Share of generated cells that lie among real ones: are they realistic?",
        lambda p: p.precision_recall[0],
        0.05,
    ),
    Metric[Points](
        "recall",
        "recall",
        "higher",
        3,
        "Share of real cells that generated ones reach: is everything covered?",
        lambda p: p.precision_recall[1],
        0.05,
    ),
)
