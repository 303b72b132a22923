"""What genes do over groups of cells: how much a gene is expressed, and where more than elsewhere.

    y_gt = log(mean over cells of t of counts per 10,000 + 0.05)
    level_g = mean over t of y_gt,    deviation_gt = y_gt - level_g - mean over genes of the same

Axes: N cells, G genes, T groups (types of cells, or types at times), K components.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.arrays import F64
from bgen.errors import UserError
from bgen.genes.expression import TARGET_SUM, library_size

LEAST = 0.05
"""Counts per 10,000 that are added before the logarithm: about what a count in one of a hundred cells is."""
LEAST_CELLS = 20
"""Cells of a group, at least; smaller ones are left out."""
SEEN = 0.01
"""Share of the cells that must express a gene for its profile to say anything."""


@dataclass(frozen=True)
class Profiles:
    """Profiles of genes.

    Attributes
    ----------
    groups
        Names of the T groups.
    level
        float64 ``[G]``.
    deviation
        float64 ``[G, T]``, before the mean over genes is taken away.
    seen
        bool ``[G]``: genes that cells enough express.
    """

    groups: list[str]
    level: F64
    deviation: F64
    seen: NDArray[np.bool_]

    def targets(self, rows: NDArray[np.int64], components: int) -> tuple[F64, F64]:
        """Return the level and the first components of all genes, ``[G, 1 + K]``, and how much each varies ``[1 + K]``.

        The components are the principal axes of the deviations of the genes ``rows``: others have no say in them. The
        second result is the variance of a component over that of the first, and 1 for the level. K is less where there
        are fewer groups.
        """
        centred = self.deviation - self.deviation[rows].mean(0)
        _, size, axes = np.linalg.svd(centred[rows], full_matrices=False)
        kept = min(components, len(self.groups) - 1)
        axes = axes[:kept] * np.sign(axes[:kept].sum(1) + 1e-12 * axes[:kept, 0])[:, None]
        share = np.square(size[:kept]) / max(float(np.square(size[:1]).sum()), 1e-12)
        return np.column_stack((self.level, centred @ axes.T)), np.concatenate(([1.0], share))


def profiles(counts: sp.csr_matrix, groups: NDArray[np.str_]) -> Profiles:
    """Return the profiles of genes in counts ``[N, G]`` of cells of ``groups`` [N].

    Raises
    ------
    UserError
        If fewer than two groups have cells enough.
    """
    library = library_size(counts)
    names, number, size = np.unique(groups[library > 0], return_inverse=True, return_counts=True)
    kept = np.flatnonzero(size >= LEAST_CELLS)
    if len(kept) < 2:
        raise UserError(
            f"Profiles of genes need two groups of {LEAST_CELLS} cells or more; there are {len(kept)} (the largest of"
            f" {len(names)} has {size.max(initial=0)} cells). Name an obs column with fewer labels."
        )
    expressed = np.flatnonzero(library > 0)
    weight = TARGET_SUM / library[expressed] / size[number]
    share = sp.csr_matrix((weight, (number, expressed)), (len(names), counts.shape[0]))
    mean = np.asarray((share[kept] @ counts).toarray(), np.float64).T
    logs = np.log(mean + LEAST)
    level = logs.mean(1)
    seen = np.diff(counts.tocsc().indptr) >= SEEN * counts.shape[0]
    return Profiles(names[kept].tolist(), level, logs - level[:, None], seen)
