"""Whether a model repeats its training cells: generated cells beside unseen real ones.

Cells of a model that has learnt the distribution are as far from the training cells as other real cells are; those of a
model that copies are closer. This detects copying, not loss of privacy: cells that are no copies may still tell who was
in the data.

Axes: N cells, G genes, D components.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.neighbors import NearestNeighbors

from bgen.evaluate.metrics.space import fit_space

CLOSE_QUANTILE = 0.05
TOLERANCE = 0.05
"""Share by which generated cells may be nearer to training cells than real ones are, before it is called memorisation.
"""


@dataclass(frozen=True)
class Memorisation:
    """How near generated cells are to the training cells, beside held-out real ones.

    Attributes
    ----------
    distance, distance_real
        Median distance to the nearest training cell, of generated and of held-out real cells.
    close
        Share of generated cells nearer than the nearest 5 % of the held-out cells; 0.05 is as close as real ones.
    copies, copies_real
        Share with exactly the counts of a training cell.
    cells
        Cells on each side.
    """

    distance: float
    distance_real: float
    close: float
    copies: float
    copies_real: float
    cells: int

    @property
    def found(self) -> bool:
        """Whether generated cells are clearly nearer to the training cells than real ones are."""
        # Three standard errors of a difference of two shares, of which one sets the limit.
        noise = 3 * np.sqrt(2 * CLOSE_QUANTILE * (1 - CLOSE_QUANTILE) / self.cells)
        return bool(
            self.distance < (1 - TOLERANCE) * self.distance_real
            or self.close > CLOSE_QUANTILE + noise
            or self.copies > self.copies_real + noise
        )

    def sentence(self) -> str:
        """Say it in plain words."""
        verdict = (
            "Generated cells are closer to the training cells than unseen real cells are: some are repeated"
            if self.found
            else "No memorisation seen: generated cells are no closer to the training cells than unseen real cells are"
        )
        return (
            f"{verdict} (median distance to the nearest training cell {self.distance:.2f}, of real cells"
            f" {self.distance_real:.2f}; exact copies {self.copies:.1%}, of real cells {self.copies_real:.1%})."
        )

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {**asdict(self), "found": self.found}


def memorisation(
    train: sparse.csr_matrix, test: sparse.csr_matrix, generated: sparse.csr_matrix, *, seed: int = 0
) -> Memorisation:
    """Compare distances to the nearest training cell, in an embedding that is fitted on half of the held-out cells.

    All are raw counts ``[N, G]`` of the same genes. The embedding is not fitted on training cells, because their own
    noise would push all others away (see :mod:`bgen.evaluate.protocols.distribution`); the half that it is fitted on is
    left out of the comparison.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(test.shape[0])
    fitted, compared = np.array_split(order, 2)
    space = fit_space(test[fitted])
    n = min(len(compared), generated.shape[0])
    real, made = test[compared[:n]], generated[rng.permutation(generated.shape[0])[:n]]
    search = NearestNeighbors(n_neighbors=1).fit(space.project(train))
    nearest_real, nearest_made = (search.kneighbors(space.project(x))[0][:, 0] for x in (real, made))
    known = set(_digests(train))
    return Memorisation(
        distance=float(np.median(nearest_made)),
        distance_real=float(np.median(nearest_real)),
        close=float((nearest_made < np.quantile(nearest_real, CLOSE_QUANTILE)).mean()),
        copies=float(np.mean([digest in known for digest in _digests(made)])),
        copies_real=float(np.mean([digest in known for digest in _digests(real)])),
        cells=n,
    )


def _digests(counts: sparse.csr_matrix) -> list[bytes]:
    """Return a hash of each cell's counts."""
    sorted_counts = counts.sorted_indices()
    data = sorted_counts.data.astype(np.int64)
    rows: list[bytes] = []
    for start, end in zip(sorted_counts.indptr[:-1], sorted_counts.indptr[1:], strict=True):
        indices: NDArray[np.int64] = sorted_counts.indices[start:end].astype(np.int64)
        rows.append(hashlib.blake2b(indices.tobytes() + data[start:end].tobytes(), digest_size=16).digest())
    return rows
