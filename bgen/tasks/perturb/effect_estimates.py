"""Average effects of perturbations on genes, shrunk to remove sampling noise.

For a label and a gene the raw estimate is the log ratio of mean expression in perturbed and control cells, compared
within strata, with its standard error, from the variance within strata: what differs between them is no noise. The
estimates of all genes under a label are shrunk together by empirical Bayes:

    d_g ~ N(beta_g, s_g^2),  beta_g ~ sum_k w_k N(0, tau_k^2),   E[beta_g | d_g] is kept

with the weights w fitted to all genes by EM (adaptive shrinkage: Stephens, Biostatistics 2017). If few genes respond,
nearly everything is noise and is shrunk to zero, while clear effects stay; if all respond, little is shrunk.

Axes: N cells, G genes, S strata, K components of the mixture.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

SCALE = 1e4
PSEUDO_CELLS = 0.5
"""One molecule in so many cells is added to both sides, so that unseen genes have a ratio."""

_STEPS = 200


def raw_effects(
    counts: sp.csr_matrix,
    perturbed: NDArray[np.int64],
    control: NDArray[np.int64],
    stratum: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return log ratios and their standard errors, ``[G]`` each.

    Parameters
    ----------
    counts
        ``[N, G]``.
    perturbed, control
        Numbers of the cells on either side.
    stratum
        ``[N]``: see :func:`control_weights`.
    """
    library = np.maximum(np.asarray(counts.sum(1)).ravel(), 1.0)
    size = np.median(library[control])
    even = np.full(len(perturbed), 1 / len(perturbed))
    mean_p, var_p = _moments(counts, perturbed, even, stratum, size / library)
    mean_c, var_c = _moments(counts, control, control_weights(perturbed, control, stratum), stratum, size / library)
    # A gene's mean cannot be known better than by Poisson noise at the number of cells.
    floor_p, floor_c = PSEUDO_CELLS / len(perturbed), PSEUDO_CELLS / len(control)
    mean_p, mean_c = mean_p + floor_p, mean_c + floor_c
    var_p, var_c = var_p + floor_p**2, var_c + floor_c**2
    return np.log(mean_p / mean_c), np.sqrt(var_p / mean_p**2 + var_c / mean_c**2)


def control_weights(
    perturbed: NDArray[np.int64], control: NDArray[np.int64], stratum: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the weight of each control cell, such that strata weigh as much as among the perturbed cells.

    The sum is 1. A stratum without controls is compared with all of them.
    """
    weight = np.zeros(len(control))
    here, share = np.unique(stratum[perturbed], return_counts=True)
    for number, cells in zip(here, share, strict=True):
        pool = stratum[control] == number
        pool = pool if pool.any() else np.ones(len(control), bool)
        weight[pool] += cells / len(perturbed) / pool.sum()
    return weight


def log_effect(
    logs: sp.csr_matrix, perturbed: NDArray[np.int64], control: NDArray[np.int64], stratum: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the difference ``[G]`` of mean logarithms ``[N, G]`` of perturbed and control cells within strata."""
    mean = np.asarray(logs[perturbed].mean(0, dtype=np.float64)).ravel()
    difference: NDArray[np.float64] = mean - logs[control].T @ control_weights(perturbed, control, stratum)
    return difference


def _moments(
    counts: sp.csr_matrix,
    cells: NDArray[np.int64],
    weight: NDArray[np.float64],
    stratum: NDArray[np.int64],
    scale: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the weighted mean of scaled counts and the variance of that mean within strata, ``[G]`` each.

    Where a stratum has one cell, its variance is taken to be the average within the others.
    """
    scaled = sp.diags(scale[cells]) @ counts[cells]
    _, code, size = np.unique(stratum[cells], return_inverse=True, return_counts=True)
    member = sp.csr_matrix((np.ones(len(cells)), (code, np.arange(len(cells)))))  # [S, cells]
    sums, squares = (member @ scaled).toarray(), (member @ scaled.multiply(scaled)).toarray()
    within = np.maximum(squares - sums**2 / size[:, None], 0)
    if (size > 1).any():
        average = within.sum(0) / (size - 1).sum()
    else:  # nothing is known within strata
        average = np.var(sums, axis=0, ddof=1) if len(size) > 1 else np.zeros(counts.shape[1])
    variance = np.where(size[:, None] > 1, within / np.maximum(size - 1, 1)[:, None], average)
    return np.asarray(scaled.T @ weight), np.bincount(code, weight**2) @ variance


def shrink(estimate: NDArray[np.float64], error: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return posterior means of effects ``[G]`` from their estimates and standard errors."""
    largest = max(float(np.sqrt(np.maximum(estimate**2 - error**2, 0).max())) * 2, 1e-2)
    tau = np.concatenate([[0.0], np.geomspace(0.01, largest, 12)])
    total = tau[:, None] ** 2 + error**2
    log_density = -0.5 * (np.log(total) + estimate**2 / total)
    density = np.exp(log_density - log_density.max(0))
    weight = np.full(len(tau), 1 / len(tau))
    for _ in range(_STEPS):
        # One more cell of evidence for "no effect" than the genes give: with few genes the weights are uncertain.
        weight = weight * (density @ (1 / (weight @ density))) + np.where(tau == 0, 1.0, 0.0)
        weight /= weight.sum()
    posterior = weight[:, None] * density
    posterior /= posterior.sum(0)
    kept: NDArray[np.float64] = (posterior * (tau[:, None] ** 2 / total)).sum(0) * estimate
    return kept
