"""What the vectors of genes tell of a number that each gene has: a ridge regression over genes.

The ridge is the one with the least error on genes that are left out, one at a time; if none is better than the mean of
all genes, that mean is the answer.

Axes: G genes whose number is known, N others, F size of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bgen.arrays import F64

RIDGES = (1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""What is tried, in units of the mean square of the vectors' numbers, times the genes."""

FOLDS = 5
LEAST_GENES = 20
"""With fewer genes to learn from, the mean is the answer."""


@dataclass(frozen=True, eq=False)
class Ridge:
    """A linear map from vectors to a number, within the range of the numbers that it was learned from."""

    centre: F64
    level: float
    slope: F64
    bounds: tuple[float, float]

    def __call__(self, vectors: F64) -> F64:
        """Return the numbers ``[N]`` of genes with the vectors ``[N, F]``."""
        foretold: F64 = np.clip(self.level + (vectors - self.centre) @ self.slope, *self.bounds)
        return foretold


def fit_ridge(vectors: F64, numbers: F64) -> Ridge:
    """Learn the map from the vectors ``[G, F]`` and numbers ``[G]`` of genes."""
    centre, level = vectors.mean(0), float(numbers.mean())
    bounds = float(numbers.min()), float(numbers.max())
    nothing = Ridge(centre, level, np.zeros(vectors.shape[1]), bounds)
    if len(numbers) < LEAST_GENES:
        return nothing
    x, y, G = vectors - centre, numbers - level, len(numbers)
    variance, axes = np.linalg.eigh(x.T @ x)
    turned = x @ axes
    along, squares = turned.T @ y, turned**2
    best, found = float(((y * G / (G - 1)) ** 2).sum()), nothing
    for ridge in RIDGES:
        weight = 1 / (np.maximum(variance, 0) + ridge * float(variance.mean()) + 1e-12)
        hat = squares @ weight + 1 / G
        error = float((((y - turned @ (weight * along)) / np.maximum(1 - hat, 1e-3)) ** 2).sum())
        if error < best:
            best, found = error, Ridge(centre, level, axes @ (weight * along), bounds)
    return found


def left_out_r2(vectors: F64, numbers: F64) -> float:
    """Return the share of the variance of numbers ``[G]`` that vectors ``[G, F]`` tell of genes that are left out.

    A fifth of the genes at a time is foretold from the others. Below zero, the mean of all genes would do better.
    """
    G = len(numbers)
    spread = float(np.square(numbers - numbers.mean()).sum()) if G else 0.0
    if G < LEAST_GENES or not spread:
        return 0.0
    fold = np.random.default_rng(0).permutation(G) % FOLDS
    foretold = np.zeros(G)
    for number in range(FOLDS):
        out = fold == number
        foretold[out] = fit_ridge(vectors[~out], numbers[~out])(vectors[out])
    return 1 - float(np.square(numbers - foretold).sum()) / spread
