"""Starts that are planned over whole populations, not over the few cells of a trajectory.

:mod:`bgen.flow.start` couples the N cells that a trajectory has of each population. The partners that so few cells find
among each other lie further apart than those that all cells would find, so what is half-way between them is drawn
towards the mean, and paths are longer than need be. Here a sample of each population, its **reference** of up to M
cells, stands for the whole; the plans are between references:

    starts of a time point     pairs of the plan between its observed neighbours' references, displaced; beside one
                               neighbour, the cells of that one's reference (by their growth, if that is learned)
    the start of a cell x      y_k with probability ~ exp((g_k - |x - y_k|^2) / eps)

with the potentials g of the entropic plan (Sinkhorn) between the time point's reference and the starts y. They extend
the plan to cells that are not in it (Pooladian and Niles-Weed, arXiv 2109.12004), so every training cell has partners
among all starts, and which one it takes is a pure function of its key. A plan is made when it is first needed.

Squared distances make a plan the same wherever its two sides are moved to as a whole, so populations that training
moves (:mod:`bgen.order.mixing`) have the plans of those that it read.

Axes: B trajectories, T time points, N cells per time point, P populations, M cells of a reference, K starts, D size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bgen.arrays import F32, F64, I64
from bgen.flow.displacement import displaced_pairs, draw
from bgen.flow.growth import BLUR, growth
from bgen.flow.start import neighbours

MOST_PLANS = 16_384
"""Plans that are remembered, of 16 bytes a start each."""

_ITERATIONS, _ACCURACY = 1000, 1e-4


@dataclass(frozen=True, eq=False)
class Plan:
    """Where the cells of one population start.

    Attributes
    ----------
    i, j
        int64 ``[K]``: start k is a share of the way from cell i_k to cell j_k of the references.
    logits
        float64 ``[K]``: g / eps.
    eps
        In squared distance.
    """

    i: I64
    j: I64
    logits: F64
    eps: float


class Plans:
    """Plans between populations.

    Parameters
    ----------
    cells
        float32 ``[n, D]``: latents of all references, one after the other.
    edges
        int64 ``[P + 1]``: reference p is ``cells[edges[p]:edges[p + 1]]``.
    penalty
        How dear growth is (:mod:`bgen.flow.growth`); None: there is none.
    """

    def __init__(self, cells: F32, edges: I64, penalty: float | None = None) -> None:
        self.cells, self.edges, self.penalty = cells, edges, penalty
        self.plan = lru_cache(maxsize=MOST_PLANS)(self._plan)

    def reference(self, population: int) -> F32:
        """Return the cells of a reference ``[M, D]``."""
        return self.cells[self.edges[population] : self.edges[population + 1]]

    @torch.no_grad()
    def start(
        self,
        z: Tensor,
        mask: Tensor,
        time: Tensor,
        observed: Tensor,
        noise: Tensor,
        population: Tensor,
        uniform: Tensor,
        moved: Tensor | None = None,
    ) -> Tensor:
        """Return ``z_1 [B, T, N, D]``: the start of every cell beside its own data ``z``.

        Parameters
        ----------
        z, mask, time, observed, noise
            As for :func:`bgen.flow.start.start`; data at all time points, as they were read.
        population
            int64 ``[B, T]``: number of each population; anything where there is none.
        uniform
            ``[B, T, N]``, in (0, 1): which of its partners each cell takes.
        moved
            ``[B, T, D]``: what training moves the populations by; None: nothing.
        """
        exists = mask.any(-1)
        before, after = neighbours(exists, observed)
        z1 = noise.clone()
        for b, t in (exists & ~observed & ((before >= 0) | (after >= 0))).nonzero().tolist():
            sides = [k for k in (int(before[b, t]), int(after[b, t])) if k >= 0]
            low, high = sides[0], sides[-1]
            gap = float(time[b, high] - time[b, low])
            share = 0.0 if low == high else float(time[b, t] - time[b, low]) / max(gap, 1e-12)
            p, q, to = (int(population[b, k]) for k in (low, high, t))
            there = mask[b, t]
            x, u = z[b, t][there].cpu().numpy(), uniform[b, t][there].double().cpu().numpy()
            found = torch.from_numpy(self.partners(x, u, p, q, to, share)).to(z1)
            if moved is not None:
                found = found + torch.lerp(moved[b, low], moved[b, high], share)
            z1[b, t, there] = found
        return z1

    def partners(self, x: F32, u: F64, low: int, high: int, to: int, share: float) -> F32:
        """Return the start ``[N, D]`` of each cell ``x [N, D]`` of population ``to``, by its draw ``u [N]``.

        It lies between the populations ``low`` and ``high``, a ``share`` of the way; beside ``low`` if they are one.
        """
        plan = self.plan(low, high, to, share)
        points = self._points(low, high, plan.i, plan.j, share)
        logits = plan.logits - _squares(x, points) / plan.eps
        edges = np.exp(logits - logits.max(1, keepdims=True)).cumsum(1)
        chosen = (edges < u[:, None] * edges[:, -1:]).sum(1)
        return points[chosen]

    def _plan(self, low: int, high: int, to: int, share: float) -> Plan:
        """Make a plan; see :meth:`partners`."""
        x, y, z = (self.reference(number) for number in (low, high, to))
        if low == high:
            i = j = np.arange(len(x))
            weights = np.full(len(x), 1 / len(x)) if self.penalty is None else growth(x, z, self.penalty)
        else:
            grown = None if self.penalty is None else growth(x, y, self.penalty)
            i, j, weights = displaced_pairs(x, y, share, grown)
            some = draw(weights, max(len(x), len(y)), np.random.default_rng([low, high]))
            i, j, weights = i[some], j[some], np.full(len(some), 1 / len(some))
        logits, eps = _potentials(z, self._points(low, high, i, j, share), weights)
        return Plan(i, j, logits, eps)

    def _points(self, low: int, high: int, i: I64, j: I64, share: float) -> F32:
        x, y = self.reference(low), self.reference(high)
        return x[i] if low == high else ((1 - share) * x[i] + share * y[j]).astype(np.float32)


def _potentials(x: F32, y: F32, weights: F64) -> tuple[F64, float]:
    """Return g / eps ``[K]`` of the starts ``y [K, D]`` with their ``weights [K]`` for cells ``x [M, D]``, and eps."""
    import ot  # takes a second, which commands without transport should not wait for

    cost = _squares(x, y)
    eps = BLUR * (float(cost.mean()) or 1.0)
    near = cost - cost.min(1, keepdims=True)  # what a side costs in any case changes potentials only
    least = near.min(0)
    _, log = ot.sinkhorn(
        np.full(len(x), 1 / len(x)),
        weights,
        near - least,
        eps,
        numItermax=_ITERATIONS,
        stopThr=_ACCURACY,
        log=True,
        warn=False,
    )
    with np.errstate(divide="ignore"):  # a start that nobody comes from
        return np.log(log["v"]) + least / eps, eps


def _squares(x: F32, y: F32) -> F64:
    """Return squared distances ``[N, K]``."""
    import ot

    found: NDArray[np.float64] = ot.dist(x.astype(np.float64), y.astype(np.float64))
    return found
