"""Growth between two populations: which cells have more descendants than others.

A transport plan that must use every earlier cell alike carries cells of a type that stays into a type that grows.
Here the earlier cells' shares may change, at a cost: with cells x_i of share a_i = 1 / N, later cells y_j of share
b_j = 1 / M and squared distances C,

    min over P   <P, C> + eps KL(P | a b^T) + rho KL(r | a),    r_i = sum_j P_ij,   subject to  sum_i P_ij = b_j

and r, which adds up to 1, says how often cell i is the partner of a later one; r_i / a_i is its relative growth. rho is
``penalty`` times the mean of C: where it is large nothing grows. A plan cannot tell growth from change: where rho is
small, cells that turned into others far away look as if they had died out. (Chizat et al., arXiv 1607.05816; for time
courses of cells Schiebinger et al., Cell 2019.)

Axes: N, M cells, D dimensions.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import ArrayLike

from bgen.arrays import F64

BLUR = 0.02
"""eps, as a share of the mean squared distance."""

_ITERATIONS, _ACCURACY = 2000, 1e-5

_FARTHEST = 500.0
"""Cost in eps beyond which exp(-cost / eps), which must not be 0, is no smaller."""


def growth(x: ArrayLike, y: ArrayLike, penalty: float) -> F64:
    """Return r ``[N]``: the share of later cells ``y [M, D]`` that come from each of the earlier cells ``x [N, D]``."""
    import ot  # takes a second, which commands without transport should not wait for

    cost = ot.dist(np.asarray(x, np.float64), np.asarray(y, np.float64))
    mean = float(cost.mean()) or 1.0
    a, b = (np.full(n, 1 / n) for n in cost.shape)
    near = cost - cost.min(0)  # later cells have their share whatever they cost, so only the range of numbers changes
    near = near.clip(max=_FARTHEST * BLUR * mean)
    with warnings.catch_warnings():  # of digits that r does not need
        warnings.simplefilter("ignore", UserWarning)
        plan = ot.unbalanced.sinkhorn_unbalanced(
            a, b, near, BLUR * mean, (penalty * mean, np.inf), numItermax=_ITERATIONS, stopThr=_ACCURACY
        )
    r: F64 = plan.sum(1)
    return r / r.sum()
