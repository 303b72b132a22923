"""Ridge regression on shares of k-mers: what sequences tell by their words alone, wherever these stand.

    y_g = mean + sum over words w of beta_w (share_gw - mean share_w) / sd_w

Axes: G genes, W words, Y targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bgen.arrays import F64

PENALTIES = 10.0 ** np.arange(1, 5.1, 0.5)
"""Of the squares of beta; the one with the least leave-one-out error is taken, for each target."""


@dataclass(frozen=True)
class WordRidge:
    """A fitted ridge regression.

    Attributes
    ----------
    centre, spread
        Mean and standard deviation of the shares of the training genes ``[W]``.
    beta
        ``[W, Y]``.
    mean
        ``[Y]``.
    """

    centre: F64
    spread: F64
    beta: F64
    mean: F64

    def predict(self, shares: F64) -> F64:
        """Return targets ``[G, Y]`` from shares ``[G, W]``."""
        told: F64 = (shares - self.centre) / self.spread @ self.beta + self.mean
        return told


def fit_words(shares: F64, targets: F64) -> WordRidge:
    """Fit targets ``[G, Y]`` to shares ``[G, W]``."""
    centre, spread, mean = shares.mean(0), shares.std(0) + 1e-12, targets.mean(0)
    x, y = (shares - centre) / spread, targets - mean
    size, axes = np.linalg.eigh(x.T @ x)
    z = x @ axes
    sums = z.T @ y
    errors, betas = [], []
    for penalty in PENALTIES:
        beta = sums / (size.clip(0) + penalty)[:, None]
        own = np.square(z) @ (1 / (size.clip(0) + penalty))
        missed = (y - z @ beta) / (1 - own)[:, None]
        errors.append(np.square(missed).mean(0))
        betas.append(axes @ beta)
    best = (np.argmin(errors, axis=0), slice(None), np.arange(targets.shape[1]))
    return WordRidge(centre, spread, np.stack(betas)[best].T, mean)
