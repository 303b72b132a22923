"""Populations mixed between systems: augmentation of trajectories along a perturbation.

Systems (cell lines, donors) are few and far apart, and what a perturbation does changes from one to the next. A
trajectory is moved towards a random mean of all systems that have the same treatment: its control population by the
difference of control means, every perturbed one by the difference of the means under that treatment,

    moved_t = sum_k w_k (mean_k,t - mean_own,t),    w ~ Dirichlet(concentration)

so that there are systems in between. Only means move; how cells scatter around them stays.

Axes: P populations, D latent size, T time points of a grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.order.trajectories import GridOfCells, Trajectories

_MIXED = 6  # what a key is for


@dataclass(frozen=True, eq=False)
class Mixing:
    """What trajectories are moved by; a pure function of (seed, draw).

    Attributes
    ----------
    trajectories
        Along a perturbation.
    means
        float32 ``[P, D + 1]``: mean latent of every population.
    share
        Of the trajectories that are moved.
    concentration
        Of the Dirichlet distribution.
    seed
        Seed of the draws.
    """

    trajectories: Trajectories
    means: NDArray[np.float32]
    share: float
    concentration: float
    seed: int

    @cached_property
    def _order(self) -> tuple[I64, I64]:
        """Trajectories in the order of their treatments, and those treatments."""
        order = np.argsort(self.trajectories.treatment, kind="stable")
        return order, self.trajectories.treatment[order]

    def moved(self, grid: GridOfCells) -> NDArray[np.float32]:
        """Return float32 ``[T, D + 1]``: zeros where a trajectory stays, or no other system has its treatment."""
        moved = np.zeros((len(grid.mask), self.means.shape[1]), np.float32)
        rng = np.random.default_rng([self.seed, _MIXED, grid.draw])
        if rng.random() >= self.share:
            return moved
        others = self.alike(grid.number)
        if len(others) < 2:
            return moved
        weight = rng.dirichlet(np.full(len(others), self.concentration))
        points = np.stack([self.trajectories.points[k][grid.taken] for k in others.tolist()])
        own = self.trajectories.points[grid.number][grid.taken]
        moved[: len(own)] = np.einsum("k,ktd->td", weight, self.means[points]) - self.means[own]
        return moved

    def alike(self, number: int) -> I64:
        """Return the numbers of the trajectories of the same treatment at the same times, this one among them."""
        order, treatment = self._order
        times, own = self.trajectories.times[number], self.trajectories.treatment[number]
        every = order[np.searchsorted(treatment, own) : np.searchsorted(treatment, own, side="right")]
        return np.array([k for k in every.tolist() if np.array_equal(self.trajectories.times[k], times)], np.int64)
