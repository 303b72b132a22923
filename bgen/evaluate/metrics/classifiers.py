"""What a classifier can tell: generated cells from real ones, and doublets from single cells.

Generated or real (Lopez-Paz and Oquab, ICLR 2017): distances in some components do not see a small shift of every
gene; a classifier on all genes does. It is trained on four fifths of the cells and asked about the rest, five times
(boosted trees: two thirds, three times). Real and generated cells of one place are in the same fold, so every fold
holds as many of the one as of the other.

Doublets: two real cells in one, of whose molecules each stays with probability one half, so that neither library size
nor number of genes tells. Gradient boosting on the embedding learns to tell them from single cells, and calls a doublet
what looks more like one than 99 % of single cells that it was not trained on. Doublets of two alike cells cannot be
told, and some measured cells are doublets: the share that is called is not zero in real data either.

Axes: N cells on each side, G genes, D components.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse, stats

from bgen.evaluate.metrics.space import Space, fit_space
from bgen.genes.expression import log_cp10k

FOLDS = 5
BOOSTED_FOLDS = 3
CALLED = 0.01
"""Share of single cells that are called doublets."""
MADE = 4
"""Simulated doublets for each single cell."""
MOST_SINGLES = 4000
"""Cells that the caller of doublets learns from."""
STRENGTH = 1e-3
"""C: the weight of the losses beside half the squared norm of the weights."""
TOGETHER = 2048
"""Genes that are dense at once."""
NEWTON = 12
"""Newton steps at most; they end when no margin moves by 1 %."""


def auc(scores: NDArray[np.float64]) -> float:
    """Return the probability that a generated cell has the higher of two scores, ties being one half.

    ``scores [2, N]`` are those of real and of generated cells. 0.5 is best.
    """
    n = scores.shape[1]
    ranks = stats.rankdata(scores.ravel())
    return float((ranks[n:].sum() - n * (n + 1) / 2) / n**2)


def held_out_linear(
    real: sparse.csr_matrix, other: sparse.csr_matrix, *, strength: float = STRENGTH
) -> NDArray[np.float64]:
    """Return the score of each cell, ``[2, N]``, by logistic regressions that did not see it.

    Features are log(1 + counts per 10,000) of all genes, each with mean 0 and variance 1 over the 2 N cells. Weights w
    minimise |w|^2 / 2 + C sum_i log(1 + exp(-y_i w x_i)), y = -1 for real and 1 for other cells. With more genes than
    cells this is solved for a, w = sum_i a_i x_i, which needs the products K_ij = x_i x_j only.
    """
    n = real.shape[0]
    kernel = _products(log_cp10k(sparse.csr_matrix(sparse.vstack([real, other]))).tocsc())
    y = np.repeat([-1.0, 1.0], n)
    scores = np.zeros(2 * n)
    for held in _folds(n, FOLDS):
        out = np.concatenate([held, held + n])
        seen = np.setdiff1d(np.arange(2 * n), out)
        a = _logistic(kernel[np.ix_(seen, seen)], y[seen], strength)
        scores[out] = kernel[np.ix_(out, seen)] @ a
    return scores.reshape(2, n)


def held_out_boosted(real: NDArray[np.floating], other: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the score of each cell, ``[2, N]``, by gradient boosting on coordinates ``[N, D]`` of other cells."""
    n = len(real)
    x, y = np.concatenate([real, other]), np.repeat([0, 1], n)
    scores = np.zeros(2 * n)
    for held in _folds(n, BOOSTED_FOLDS):
        out = np.concatenate([held, held + n])
        seen = np.setdiff1d(np.arange(2 * n), out)
        model = _trees()
        scores[out] = model.fit(x[seen], y[seen]).decision_function(x[out])
    return scores.reshape(2, n)


def _folds(n: int, folds: int) -> list[NDArray[np.intp]]:
    return np.array_split(np.random.default_rng(0).permutation(n), folds)


def _products(features: sparse.csc_matrix) -> NDArray[np.float64]:
    """Return the products of standardised rows, ``[cells, cells]``; a constant column is left out."""
    cells, genes = features.shape
    kernel = np.zeros((cells, cells), np.float32)
    for start in range(0, genes, TOGETHER):
        block = features[:, start : start + TOGETHER].toarray()
        block -= block.mean(axis=0)
        spread = block.std(axis=0)
        block = block[:, spread > 1e-6] / spread[spread > 1e-6]
        kernel += block @ block.T
    return kernel.astype(np.float64)


def _logistic(kernel: NDArray[np.float64], y: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    """Return the coefficients a ``[cells]`` by Newton's method in the stable form (Rasmussen and Williams, 3.1)."""
    f = np.zeros(len(y))
    a = f
    for _ in range(NEWTON):
        right = 1.0 / (1.0 + np.exp(-np.clip(y * f, -30, 30)))
        weight = strength * right * (1 - right)
        root = np.sqrt(weight)
        b = weight * f + strength * y * (1 - right)
        inner = root[:, None] * kernel * root
        inner[np.diag_indices_from(inner)] += 1.0
        factor: Any = linalg.cho_factor(inner, lower=True, overwrite_a=True, check_finite=False)
        step = b - root * linalg.cho_solve(factor, root * (kernel @ b), check_finite=False) - a
        size = 1.0
        moved = kernel @ step
        before = _objective(a, f, y, strength)
        while size > 1e-3 and _objective(a + size * step, f + size * moved, y, strength) > before:
            size /= 2
        a, f = a + size * step, f + size * moved
        if np.abs(size * moved).max() < 1e-2 * max(1.0, float(np.abs(f).max())):
            break
    return a


def _objective(a: NDArray[np.float64], f: NDArray[np.float64], y: NDArray[np.float64], strength: float) -> float:
    return float(a @ f / 2 + strength * np.logaddexp(0, -y * f).sum())


@dataclass(frozen=True)
class DoubletCaller:
    """Made by :func:`fit_doublets`. ``space`` was fitted on other cells than those that the model was trained on."""

    space: Space
    model: Any
    least: float

    def call(self, counts: sparse.csr_matrix) -> NDArray[np.bool_]:
        """Return which cells, raw counts ``[N, G]``, are called doublets, bool ``[N]``."""
        return np.asarray(self.model.decision_function(self.space.project(counts)) > self.least)


def thinned(counts: sparse.csr_matrix, share: float, rng: np.random.Generator) -> sparse.csr_matrix:
    """Return counts of which every molecule stays with this probability."""
    kept = counts.copy()
    kept.data = rng.binomial(np.rint(counts.data).astype(np.int64), share).astype(counts.dtype)
    kept.eliminate_zeros()
    return kept


def simulated_doublets(counts: sparse.csr_matrix, n: int, rng: np.random.Generator) -> sparse.csr_matrix:
    """Return n cells that are made of halves of two random ones."""
    first, second = (counts[rng.integers(counts.shape[0], size=n)] for _ in range(2))
    return sparse.csr_matrix(thinned(first, 0.5, rng) + thinned(second, 0.5, rng))


def fit_doublets(counts: sparse.csr_matrix) -> DoubletCaller:
    """Learn from real cells ``[N, G]``.

    An embedding is fitted on a quarter of them, trees are trained on half, and the last quarter says how sure one must
    be: cells lie further out in an embedding that was fitted on them, so new cells would look like doublets.
    """
    rng = np.random.default_rng(0)
    cells = counts[rng.permutation(counts.shape[0])[:MOST_SINGLES]]
    quarter = cells.shape[0] // 4
    fitted, trained, last = cells[:quarter], cells[quarter:-quarter], cells[-quarter:]
    space = fit_space(fitted)
    singles = np.repeat(space.project(trained), MADE, axis=0)  # weights would do, and take scikit-learn a minute
    made = space.project(simulated_doublets(trained, len(singles), rng))
    from sklearn.ensemble import HistGradientBoostingClassifier

    model = HistGradientBoostingClassifier(max_iter=80, max_leaf_nodes=15, early_stopping=False, random_state=0)
    model.fit(np.concatenate([singles, made]), np.repeat([0, 1], len(singles)))
    return DoubletCaller(space, model, float(np.quantile(model.decision_function(space.project(last)), 1 - CALLED)))


def _trees() -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(
        max_iter=30, max_leaf_nodes=8, max_bins=63, early_stopping=False, random_state=0
    )
