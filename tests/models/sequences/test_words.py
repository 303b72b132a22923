"""Ridge regression on shares of words, beside the plain formulas."""

from __future__ import annotations

import numpy as np

from bgen.models.sequences.words import PENALTIES, fit_words


def test_ridge_is_the_one_of_its_least_leave_one_out_error() -> None:
    rng = np.random.default_rng(0)
    shares = rng.random((48, 5))
    targets = shares @ rng.normal(size=(5, 2)) + [[0.5, 3]] * rng.normal(size=(48, 2))
    found = fit_words(shares, targets)
    x, y = (shares - shares.mean(0)) / shares.std(0), targets - targets.mean(0)
    for column in range(2):
        errors, told = [], []
        for penalty in PENALTIES:
            gram = x.T @ x + penalty * np.eye(5)
            left_out = np.empty(48)
            for gene in range(48):  # means and spreads are those of all genes
                kept = np.arange(48) != gene
                beta = np.linalg.solve(gram - np.outer(x[gene], x[gene]), x[kept].T @ y[kept, column])
                left_out[gene] = x[gene] @ beta
            errors.append(np.square(y[:, column] - left_out).mean())
            told.append(x @ np.linalg.solve(gram, x.T @ y[:, column]))
        best = int(np.argmin(errors))
        np.testing.assert_allclose(found.predict(shares)[:, column], told[best] + targets[:, column].mean())
