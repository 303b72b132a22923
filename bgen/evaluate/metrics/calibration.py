"""Whether a model's distributions of counts are as wide as they should be.

For a calibrated model the randomised probability integral transform u = F(x - 1) + v P(x), with v uniform, is uniform
(Dunn and Smyth, J. Comput. Graph. Stat. 1996). Distributions that are too wide heap u in the middle, those that are too
narrow at the ends.

Axes: N cells, G genes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy import stats

LEVELS = (0.5, 0.9)


@dataclass(frozen=True)
class Calibration:
    """ks: largest gap between the distribution of u and the uniform one; coverage: share of u in the central 50 and
    90 %, which should be 0.5 and 0.9; all over genes with a mean of at least 0.1 counts, if there are any.
    """

    ks: float
    coverage_50: float
    coverage_90: float

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)


def calibration(
    counts: sp.csr_matrix, mean: NDArray[np.float64], theta: NDArray[np.float64], *, seed: int = 0
) -> Calibration:
    """Compare counts ``[N, G]`` with negative binomials of ``mean [N, G]`` and inverse dispersion ``theta [G]``.

    The model must not have seen the counts: give it one half of the molecules, and compare with the other
    (:func:`bgen.evaluate.metrics.denoising.split_molecules`); thinning keeps theta and halves the mean.
    """
    shown = np.asarray(counts.mean(0)).ravel() >= 0.1
    genes = np.flatnonzero(shown) if shown.any() else np.arange(counts.shape[1])
    x, mu = counts[:, genes].toarray(), np.maximum(mean[:, genes], 1e-9)
    n = np.broadcast_to(theta[genes], mu.shape)
    p = n / (n + mu)
    below = stats.nbinom.cdf(x - 1, n, p)
    u = below + np.random.default_rng(seed).random(x.shape) * stats.nbinom.pmf(x, n, p)
    covered = [float((np.abs(u - 0.5) <= level / 2).mean()) for level in LEVELS]
    return Calibration(float(stats.kstest(u.ravel(), "uniform").statistic), *covered)
