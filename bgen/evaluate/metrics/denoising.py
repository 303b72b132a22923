"""Whether a denoised cell is closer to its expectation than the raw cell, by molecular cross-validation.

Each cell's molecules are split at random into two halves; the cell is denoised from one half and predicts the other
(Batson, Royer and Webber, "Molecular cross-validation for single-cell RNA-seq", 2019). The halves are independent given
the cell's true state, so copying noise does not pay.

Axes: N cells, G genes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.evaluate.metrics.space import COMPONENTS, fit_space
from bgen.genes.expression import library_size, log_cp10k

Denoiser = Callable[[sp.csr_matrix], NDArray[np.float64]]
"""From counts of one half ``[N, G]`` to the expected counts of such a half ``[N, G]``."""

SMALLEST = 1e-4
"""Expected counts are taken as at least this, so that one gene cannot decide the score."""


def split_molecules(counts: sp.csr_matrix, seed: int) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Give each molecule to one of two halves with probability 1/2."""
    first = counts.copy()
    first.data = np.random.default_rng(seed).binomial(counts.data.astype(np.int64), 0.5).astype(counts.data.dtype)
    second = sp.csr_matrix(counts - first)
    for half in (first, second):
        half.eliminate_zeros()
    return first, second


def poisson_deviance(counts: sp.csr_matrix, expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``2 sum_g (x log(x / mu) - (x - mu))`` of each cell, ``[N]``."""
    mu = np.maximum(expected, SMALLEST)
    cells = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    at = mu[cells, counts.indices]
    nonzero = np.bincount(cells, counts.data * np.log(counts.data / at) - counts.data, counts.shape[0])
    return 2 * (nonzero + mu.sum(axis=1))


def molecular_cross_validation(
    counts: sp.csr_matrix, denoisers: Mapping[str, Denoiser], *, seed: int = 0
) -> dict[str, NDArray[np.float64]]:
    """Return the Poisson deviance of each cell ``[N]`` on the other half: of each denoiser, and of "raw", "mean" and
    "pca"; lower is better.

    "raw" predicts by the half itself, "mean" by the average profile at the size of the cell, "pca" by principal
    components of log counts per 10,000; their number (1 to 30) is chosen on the other half, which favours "pca".
    """
    first, second = split_molecules(counts, seed)
    size = library_size(first)[:, None]
    average = np.asarray(first.sum(0, dtype=np.float64)).ravel()
    predicted = {name: denoiser(first) for name, denoiser in denoisers.items()}
    predicted["raw"] = first.toarray().astype(np.float64)
    predicted["mean"] = size * average / average.sum()
    scores = {name: poisson_deviance(second, values) for name, values in predicted.items()}
    by_number = (poisson_deviance(second, pca_denoised(first, k)) for k in (1, 2, 3, 5, 8, 12, 20, COMPONENTS))
    scores["pca"] = min(by_number, key=np.mean)
    return scores


def pca_denoised(counts: sp.csr_matrix, components: int) -> NDArray[np.float64]:
    """Return expected counts ``[N, G]`` by principal components of log(1 + counts per 10,000)."""
    logs = log_cp10k(counts)
    space = fit_space(counts, components)
    mean = np.asarray(logs.mean(0)).ravel()
    share = np.maximum(np.expm1(mean + space.project(counts) @ space.components), 0)
    expected: NDArray[np.float64] = (
        library_size(counts)[:, None] * share / np.maximum(share.sum(1, keepdims=True), 1e-12)
    )
    return expected
