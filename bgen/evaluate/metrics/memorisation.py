"""Whether a model repeats its training cells: generated cells beside unseen real ones.

Three tests, each of one question: do generated cells more often than unseen real ones (1) have exactly the counts of a
training cell, (2) lie much nearer to one training cell than to the others, (3) share with one training cell much more
of what is by chance than with the others? (2) and (3) look at ratios of a cell's distance to its nearest training cell
and to its K-th nearest: a model whose cells are merely too typical is nearer to all of them alike. For (3) rare genes
weigh most, so that half of a training cell's molecules still tell where they come from.

This detects copying, not loss of privacy: cells that are no copies may still tell who was in the data.

Axes: N cells, G genes, D components, K nearest training cells.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, stats

from bgen.evaluate.metrics.space import fit_space
from bgen.genes.expression import log_cp10k

LEVEL = 0.05
"""Share of honest models that are called memorising, at most; split among the three tests."""

NEIGHBOUR = 5
"""K: the neighbour that a cell's nearest one is compared with. Mixtures of fewer than K training cells are seen."""

SHARES = (0.005, 0.01, 0.02, 0.05)
"""Shares of all compared cells, those with the smallest ratios, among which generated ones may be too many."""

PERMUTATIONS = 4000
MOST_CELLS = 5000
"""Cells of either set that are looked at."""
TOGETHER = 2000
"""Cells whose similarities to all training cells are held at once."""


@dataclass(frozen=True)
class Memorisation:
    """How near generated cells are to the training cells, beside held-out real ones.

    Attributes
    ----------
    distance, distance_real
        Median distance to the nearest training cell, of generated and of held-out real cells.
    copies, copies_real
        Share with exactly the counts of a training cell.
    p_copies, p_near, p_alike
        Probability of as many exact copies, as many cells that are near to one training cell alone, and as many that
        are alike one training cell alone, if generated cells were as new as held-out ones.
    cells
        Generated cells that were looked at.
    """

    distance: float
    distance_real: float
    copies: float
    copies_real: float
    p_copies: float
    p_near: float
    p_alike: float
    cells: int

    @property
    def least(self) -> float:
        """The least of the three probabilities."""
        return min(self.p_copies, self.p_near, self.p_alike)

    @property
    def found(self) -> bool:
        """Whether one of the three tests is clear, at a level of 5 % for the three together."""
        return self.least < LEVEL / 3

    def sentence(self) -> str:
        """Say it in plain words."""
        verdict = (
            "Generated cells repeat training cells more than unseen real cells do"
            if self.found
            else "No memorisation seen: generated cells repeat training cells no more than unseen real cells do"
        )
        return (
            f"{verdict} (median distance to the nearest training cell {self.distance:.2f}, of real cells"
            f" {self.distance_real:.2f}; exact copies {self.copies:.1%}, of real cells {self.copies_real:.1%};"
            f" smallest p of three tests {self.least:.2g})."
        )

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {**asdict(self), "found": self.found}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Memorisation:
        """Return what :meth:`as_json` gave."""
        return cls(**{name: value for name, value in told.items() if name != "found"})


def memorisation(
    train: sparse.csr_matrix, test: sparse.csr_matrix, generated: sparse.csr_matrix, *, seed: int = 0
) -> Memorisation:
    """Compare generated with held-out cells by their nearest training cells.

    All are raw counts ``[N, G]`` of the same genes. Copies and likeness are looked for in all cells of both sets (at
    most :data:`MOST_CELLS`), which need not be equally many. The embedding is fitted on half of the held-out cells,
    which are left out of the comparison of distances, and not on training cells, because their own noise would push
    all others away (see :mod:`bgen.evaluate.protocols.distribution`).
    """
    rng = np.random.default_rng(seed)
    real, made = (x[rng.permutation(x.shape[0])[:MOST_CELLS]] for x in (test, generated))
    fitted, compared = np.array_split(np.arange(real.shape[0]), 2)
    space = fit_space(real[fitted])
    n = min(len(compared), made.shape[0])
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=min(NEIGHBOUR, train.shape[0])).fit(space.project(train))
    near_real, near_made = (search.kneighbors(space.project(x[-n:]))[0] for x in (real, made))
    known = set(_digests(train))
    copied, copied_real = (sum(digest in known for digest in _digests(x)) for x in (made, real))
    counted = [[copied, made.shape[0] - copied], [copied_real, real.shape[0] - copied_real]]
    return Memorisation(
        distance=float(np.median(near_made[:, 0])),
        distance_real=float(np.median(near_real[:, 0])),
        copies=copied / made.shape[0],
        copies_real=copied_real / real.shape[0],
        p_copies=float(stats.fisher_exact(np.array(counted), "greater").pvalue),
        p_near=_excess(_alone(near_made), _alone(near_real), rng),
        p_alike=_excess(_alone(_unlikeness(train, made)), _alone(_unlikeness(train, real)), rng),
        cells=made.shape[0],
    )


def _alone(distances: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the distance to the nearest over that to the furthest of the ``[N, K]`` nearest: small for a copy."""
    return np.asarray(distances[:, 0] / np.maximum(distances[:, -1], 1e-12), dtype=np.float64)


def _unlikeness(train: sparse.csr_matrix, cells: sparse.csr_matrix) -> NDArray[np.float64]:
    """Return 1 - cosine to the K most similar training cells, ``[N, K]``, ascending.

    Of log(1 + counts per 10,000), times the logarithm of how few training cells have the gene: what many cells have
    says nothing of one cell.
    """
    seen = np.asarray((train > 0).sum(0)).ravel()
    weight = sparse.diags(np.log((1 + train.shape[0]) / (1 + seen)))
    from sklearn.preprocessing import normalize

    features, queries = (normalize(log_cp10k(x) @ weight).astype(np.float32) for x in (train, cells))
    k = min(NEIGHBOUR, train.shape[0])
    found = []
    for start in range(0, cells.shape[0], TOGETHER):
        likeness = np.asarray((queries[start : start + TOGETHER] @ features.T).todense())
        found.append(1.0 - np.sort(np.partition(likeness, -k, axis=1)[:, -k:], axis=1)[:, ::-1])
    return np.concatenate(found).astype(np.float64)


def _excess(made: NDArray[np.float64], real: NDArray[np.float64], rng: np.random.Generator) -> float:
    """Return the probability, by permutation, of as many of the ``made`` among the smallest values of both.

    The statistic is the largest z over several numbers of smallest values, so it is compared with its own distribution.
    """
    values = np.concatenate([made, real]) + 1e-12 * rng.random(len(made) + len(real))
    is_made = (np.arange(len(values)) < len(made))[np.argsort(values)]
    numbers = np.unique([max(4, round(share * len(values))) for share in SHARES])
    numbers = numbers[numbers < len(values)]
    if len(numbers) == 0:
        return 1.0
    share = len(made) / len(values)

    def statistic(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        spread = np.sqrt(numbers * share * (1 - share) * (len(values) - numbers) / (len(values) - 1))
        return np.asarray(((counts - numbers * share) / spread).max(-1))

    observed = statistic(np.cumsum(is_made)[numbers - 1])
    # Only who is among the smallest matters: drawn in order, group by group.
    steps = np.diff(numbers, prepend=0)
    left = np.full(PERMUTATIONS, len(made))
    total, counts = len(values), np.zeros((PERMUTATIONS, len(numbers)), np.int64)
    for place, step in enumerate(steps):
        drawn = rng.hypergeometric(left, total - left, step)
        counts[:, place] = drawn + (counts[:, place - 1] if place else 0)
        left, total = left - drawn, total - step
    return float((1 + (statistic(counts) >= observed - 1e-9).sum()) / (1 + PERMUTATIONS))


def _digests(counts: sparse.csr_matrix) -> list[bytes]:
    """Return a hash of each cell's counts."""
    sorted_counts = counts.sorted_indices()
    data = sorted_counts.data.astype(np.int64)
    rows: list[bytes] = []
    for start, end in zip(sorted_counts.indptr[:-1], sorted_counts.indptr[1:], strict=True):
        indices: NDArray[np.int64] = sorted_counts.indices[start:end].astype(np.int64)
        rows.append(hashlib.blake2b(indices.tobytes() + data[start:end].tobytes(), digest_size=16).digest())
    return rows
