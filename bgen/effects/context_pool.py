"""Which contexts of training tell how much about a user's control cells.

The distance of two sets of control cells is that of their average cells on the scale log(1 + counts per 10,000), freed
of sampling noise. From it follow two answers for the effect e of a label in control cells x:

    seen    sum_c w_c e_c,  w_c ~ exp(-(d_c^2 / near)^2)   where x is one of the contexts c, as its distance shows
    unseen  sum_c w_c e_c,  w_c ~ exp(-d_c^2 / width)      blended with the bilinear form, if that is used

and what counts is s seen + (1 - s) unseen with s = exp(-min (d_c^2 / near)^2). The width, and whether the bilinear form
is used, are chosen by leaving contexts out. With few contexts, or contexts whose effects do not differ, the width is
infinite: all count alike.

Axes: C contexts, G genes, K features of a context, R directions of effects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.arrays import F64, I64
from bgen.effects.moments import GroupMoments, moments_of

NEAR = 0.5
"""Square of the distance at which cells are hardly those of a context any more, in units of the typical square of the
distance between a context and its nearest neighbour."""


@dataclass(frozen=True)
class Controls:
    """The average control cell: mean ``[G]`` in counts per 10,000, and the variance ``[G]`` of that mean."""

    mean: F64
    variance: F64

    @property
    def logs(self) -> F64:
        """The average cell on the scale of effects ``[G]``."""
        found: F64 = np.log1p(self.mean)
        return found

    @property
    def noise(self) -> float:
        """By how much sampling alone moves it on that scale: the expected square of the distance."""
        return float((self.variance / (1 + self.mean) ** 2).sum())


def controls_of(counts: sp.csr_matrix) -> Controls:
    """Return the average cell of control cells ``[N, G]``."""
    nothing = np.zeros(counts.shape[0], np.int64)
    return read_controls(moments_of(counts, nothing, nothing))


def read_controls(moments: GroupMoments) -> Controls:
    """Return the average cell of groups of control cells."""
    return Controls(*moments.pooled())


@dataclass(frozen=True)
class ContextPool:
    """Control cells of the contexts of training.

    Attributes
    ----------
    logs
        Their average cells on the scale log(1 + counts per 10,000) ``[C, G]``.
    noise
        See :attr:`Controls.noise` ``[C]``.
    off
        ``[C, G]``: by how much a perturbed cell of each context is better predicted from what all cells of the context
        say than from these control cells and the effect; the negative of their sampling errors, as far as it is known.
    width
        Of the weights of contexts that are not the user's; infinite: all alike.
    """

    logs: NDArray[np.float32]
    noise: F64
    off: NDArray[np.float32]
    width: float = np.inf

    def distances(self, controls: Controls) -> F64:
        """Return the squares of the distances ``[C]`` of control cells from the contexts."""
        away = ((self.logs - controls.logs) ** 2).sum(1, dtype=np.float64) - self.noise - controls.noise
        found: F64 = np.maximum(away, 0)
        return found

    def errors(self, controls: Controls) -> F64:
        """Return ``off [G]`` of the user's control cells, as far as they are those of training.

        The same cells are at no distance, and different cells of one context at that of the noise on both sides: what
        is missing of it is shared.
        """
        if not len(self.logs):
            return np.zeros(self.logs.shape[1])
        away = ((self.logs - controls.logs) ** 2).sum(1, dtype=np.float64)
        shared = np.clip(1 - away / np.maximum(self.noise + controls.noise, 1e-12), 0, 1)
        found: F64 = shared.max() * self.off[int(shared.argmax())].astype(np.float64)
        return found

    def between(self) -> F64:
        """Return the squares of the distances ``[C, C]`` between contexts."""
        logs = self.logs.astype(np.float64)
        squares = (logs**2).sum(1)
        away = squares[:, None] + squares - 2 * logs @ logs.T - self.noise[:, None] - self.noise
        np.fill_diagonal(away, 0)
        found: F64 = np.maximum(away, 0)
        return found

    def near(self) -> float:
        """Return the square of the distance within which control cells are those of a context."""
        if len(self.logs) < 2:
            return float(self.noise.sum())
        away = self.between()
        np.fill_diagonal(away, np.inf)
        return NEAR * max(float(np.median(away.min(1))), float(np.median(self.noise)))

    def weights(self, distances: F64, pool: I64) -> tuple[F64, F64, float]:
        """Return the weights of contexts ``pool`` if the cells are of one of them, and if not; and how sure it is that
        they are.
        """
        away = distances[pool]
        steps = (away / max(self.near(), 1e-12)) ** 2
        return kernel(steps, 1.0), kernel(away, self.width), float(np.exp(-steps.min()))


def kernel(away: F64, width: float) -> F64:
    """Return weights of sum 1 that fall with squares of distances, exp(-d^2 / width)."""
    if np.isinf(width):
        return np.full(len(away), 1 / len(away))
    weight = np.exp(-(away - away.min()) / max(width, 1e-12))
    found: F64 = weight / weight.sum()
    return found
