"""How far apart two populations of cells are, from equally many samples of each.

Every function takes the coordinates ``real`` and ``generated``, both [N, D] with the same N. All these estimates depend
on N (exact W2 is biased upwards, the k-NN manifolds shrink), so unequal sizes are an error and figures may be compared
at the same N only.

Symbols: x_i real cells, y_j generated cells, d the Euclidean distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import ot
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist, pdist

from bgen.evaluate.metrics.metric import Metric

NEIGHBOURS = 5
_EMD_ITERATIONS = 10_000_000


@dataclass(frozen=True, eq=False)
class Points:
    """Equally many real and other cells, as coordinates ``[N, D]`` in one embedding."""

    real: NDArray[Any]
    other: NDArray[Any]

    @cached_property
    def precision_recall(self) -> tuple[float, float]:
        """See :func:`precision_recall`."""
        return precision_recall(self.real, self.other)


@dataclass(frozen=True, eq=False)
class Populations(Points):
    """Points with the bandwidth of a kernel, in the coordinates' units."""

    bandwidth: float


def wasserstein2(real: ArrayLike, generated: ArrayLike) -> float:
    """Return the exact 2-Wasserstein distance.

    W2 = sqrt( min over couplings P of sum_ij P_ij d(x_i, y_j)^2 ), uniform weights 1/N. The coupling is found by the
    network simplex of POT (Bonneel et al., SIGGRAPH Asia 2011; Flamary et al., JMLR 2021). In coordinates' units.
    """
    x, y = _equal_samples(real, generated)
    weights = np.full(len(x), 1.0 / len(x))
    cost = ot.emd2(weights, weights, cdist(x, y, "sqeuclidean"), numItermax=_EMD_ITERATIONS)
    return float(np.sqrt(max(float(cost), 0.0)))


def wasserstein1(real: ArrayLike, generated: ArrayLike) -> float:
    """Return the exact 1-Wasserstein distance: min over couplings P of sum_ij P_ij d(x_i, y_j). In coordinates' units.

    The figure that trajectory benchmarks report; see :func:`wasserstein2`.
    """
    x, y = _equal_samples(real, generated)
    weights = np.full(len(x), 1.0 / len(x))
    return float(ot.emd2(weights, weights, cdist(x, y), numItermax=_EMD_ITERATIONS))


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
    x, y = _equal_samples(real, generated)
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, not {bandwidth}")
    gamma = 1.0 / (2.0 * bandwidth**2)
    within_x = np.exp(-gamma * pdist(x, "sqeuclidean")).mean()
    within_y = np.exp(-gamma * pdist(y, "sqeuclidean")).mean()
    between = np.exp(-gamma * cdist(x, y, "sqeuclidean")).mean()
    return float(within_x + within_y - 2.0 * between)


def energy_distance(real: ArrayLike, generated: ArrayLike) -> float:
    """Return the unbiased estimate of the energy distance.

    E = 2 mean_ij d(x_i, y_j) - mean_{i != i'} d(x_i, x_i') - mean_{j != j'} d(y_j, y_j')
    (Szekely and Rizzo, J. Stat. Plan. Inference 2013), with the plain distance: its square would see means only. Not
    square-rooted; 0 in expectation for equal distributions. In coordinates' units.
    """
    x, y = _equal_samples(real, generated)
    return float(2.0 * cdist(x, y).mean() - pdist(x).mean() - pdist(y).mean())


def nearest_neighbour_accuracy(real: ArrayLike, generated: ArrayLike) -> float:
    """Return the leave-one-out accuracy of a 1-nearest-neighbour classifier that tells real from generated.

    Lopez-Paz and Oquab, ICLR 2017. 0.5 is best; 1 means fully separable; below 0.5 each cell's neighbour tends to be of
    the other kind, as when training cells are copied. Neighbours at equal distance share the vote.
    """
    x, y = _equal_samples(real, generated)
    distances = cdist(np.concatenate([x, y]), np.concatenate([x, y]))
    np.fill_diagonal(distances, np.inf)
    nearest = distances <= distances.min(axis=1, keepdims=True)
    is_real = np.arange(len(distances)) < len(x)
    same = is_real[:, None] == is_real[None, :]
    return float(((nearest & same).sum(axis=1) / nearest.sum(axis=1)).mean())


def precision_recall(real: ArrayLike, generated: ArrayLike, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Return improved precision and recall (Kynkaanniemi et al., NeurIPS 2019).

    A population's manifold is the union of balls around its cells, each reaching to its k-th nearest neighbour in that
    population. Precision: share of generated cells on the real manifold (are they realistic?). Recall: share of real
    cells on the generated manifold (is everything covered?).
    """
    x, y = _equal_samples(real, generated)
    if not 1 <= k < len(x):
        raise ValueError(f"k = {k} needs more than {k} cells in each population, got {len(x)}")
    between = cdist(x, y)
    precision = (between <= _radius(x, k)[:, None]).any(axis=0).mean()
    recall = (between <= _radius(y, k)[None, :]).any(axis=1).mean()
    return float(precision), float(recall)


def _radius(points: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    # Column 0 of the partition is the point itself, at distance 0.
    return np.partition(cdist(points, points), k, axis=1)[:, k]


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
        lambda p: wasserstein1(p.real, p.other),
    ),
    Metric[Points](
        "w2",
        "2-Wasserstein",
        "lower",
        3,
        "Least effort of moving generated cells onto real ones in the embedding.",
        lambda p: wasserstein2(p.real, p.other),
    ),
    Metric[Populations](
        "mmd2",
        "MMD² (RBF)",
        "lower",
        4,
        "Difference of the two densities at one typical length scale; about 0 if equal.",
        lambda p: mmd2(p.real, p.other, p.bandwidth),
    ),
    Metric[Points](
        "energy",
        "energy distance",
        "lower",
        3,
        "Difference of the two distributions at all scales; about 0 if equal.",
        lambda p: energy_distance(p.real, p.other),
    ),
    Metric[Points](
        "nn_accuracy",
        "1-NN accuracy",
        "half",
        3,
        "How often a cell's nearest neighbour gives away which set it is in.",
        lambda p: nearest_neighbour_accuracy(p.real, p.other),
    ),
    Metric[Points](
        "precision",
        "precision",
        "higher",
        3,
        "Share of generated cells that lie among real ones: are they realistic?",
        lambda p: p.precision_recall[0],
    ),
    Metric[Points](
        "recall",
        "recall",
        "higher",
        3,
        "Share of real cells that generated ones reach: is everything covered?",
        lambda p: p.precision_recall[1],
    ),
)
