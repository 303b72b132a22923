"""References of whole populations, over which a flow's starts are planned (:mod:`bgen.flow.plans`).

The codec is frozen, so they are encoded once, when training starts or is resumed: a pure function of (store, split).
Every rank holds all of them, because any trajectory may come to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bgen.arrays import F32, I64
from bgen.config.flow import CouplingConfig
from bgen.errors import UserError
from bgen.flow.plans import Plans
from bgen.order.trajectories import Trajectories

MOST_BYTES = 8 << 30
"""Memory of the references on a rank, at most."""


def reference_edges(trajectories: Trajectories, cells: int) -> I64:
    """Return where the references of at most ``cells`` cells begin in the line of all of them, int64 ``[P + 1]``."""
    sizes = np.minimum(np.diff(trajectories.edges), cells)
    return np.concatenate([[0], np.cumsum(sizes)])


def require_room(trajectories: Sequence[Trajectories], size: int, cells: int) -> None:
    """Raise UserError if references of ``cells`` cells of ``size`` numbers take more memory than :data:`MOST_BYTES`."""
    needed = sum(int(reference_edges(some, cells)[-1]) for some in trajectories) * size * 4
    if needed > MOST_BYTES:
        populations = sum(len(some.edges) - 1 for some in trajectories)
        fits = max(1, MOST_BYTES // (4 * size * populations))
        raise UserError(
            f"flow.coupling.cells={cells}: so many cells of each of {populations:,} populations take"
            f" {needed / (1 << 30):.2g} GiB on every rank, of {MOST_BYTES / (1 << 30):.2g} at most. Set it to"
            f" {fits}, or to 0."
        )


def plans_of(splits: Sequence[Sequence[F32]], coupling: CouplingConfig) -> Plans:
    """Return plans between the references ``[M, D + 1]`` of the populations of several splits, numbered in turn."""
    every = [reference for split in splits for reference in split]
    edges = np.cumsum([0, *(len(reference) for reference in every)])
    return Plans(np.concatenate(every), edges, coupling.penalty if coupling.growth else None)
