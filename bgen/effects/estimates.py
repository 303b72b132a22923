"""Estimates of effects on genes, shrunk to remove sampling noise, and cells weighted so that strata are alike.

Estimates of all genes under a label, each with its standard error, are shrunk together by empirical Bayes:

    d_g ~ N(beta_g, s_g^2),  beta_g ~ sum_k w_k N(0, tau_k^2),   E[beta_g | d_g] is kept

with the weights w fitted to all genes by EM (adaptive shrinkage: Stephens, Biostatistics 2017). If few genes respond,
nearly everything is noise and is shrunk to zero, while clear effects stay; if all respond, little is shrunk.

Axes: N cells, G genes, K components of the mixture.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

_STEPS = 200
_GENES = 2000
"""Genes that weights are fitted to, evenly spread, if there are twice as many or more."""


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


def shrink(estimate: NDArray[np.float64], error: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return posterior means of effects ``[G]`` from their estimates and standard errors."""
    largest = max(float(np.sqrt(np.maximum(estimate**2 - error**2, 0).max())) * 2, 1e-2)
    tau = np.concatenate([[0.0], np.geomspace(0.01, largest, 12)])
    total = tau[:, None] ** 2 + error**2
    log_density = -0.5 * (np.log(total) + estimate**2 / total)
    density = np.exp(log_density - log_density.max(0))
    weight = np.full(len(tau), 1 / len(tau))
    each = max(1, density.shape[1] // _GENES)
    some = np.ascontiguousarray(density[:, ::each])
    # One more cell of evidence for "no effect" than the genes give: with few genes the weights are uncertain.
    one_more = np.where(tau == 0, 1.0, 0.0) / each
    for _ in range(_STEPS):
        weight = weight * (some @ (1 / (weight @ some))) + one_more
        weight /= weight.sum()
    posterior = weight[:, None] * density
    posterior /= posterior.sum(0)
    kept: NDArray[np.float64] = (posterior * (tau[:, None] ** 2 / total)).sum(0) * estimate
    return kept
