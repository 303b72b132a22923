"""The baselines of generated cells: negative binomials with independent genes, one per cell type or one per cluster.

Axes: N cells, G genes, K cell types or clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from bgen.evaluate.metrics.space import fit_space
from bgen.evaluate.protocols.inputs import JOINT
from bgen.genes.expression import library_size

CLUSTERS = 50
LEAST = 10
"""Cells of a cluster; a type with fewer has the negative binomial of all cells of its first condition, or of all."""
_ROWS = 512  # cells drawn at a time: bounds the dense part to _ROWS x G


@dataclass(frozen=True)
class TypeNegativeBinomial:
    """Per cell type k and gene g: x ~ NB(mean = l p_kg, variance = l p_kg + alpha_kg (l p_kg)^2), l ~ LogNormal_k.

    types: names [K]; share: p, float64 [K, G], rows sum to 1; dispersion: alpha >= 0, float64 [K, G]; log_library_mean,
    log_library_sd: float64 [K]. The last row stands for all cells together; it serves types that training did not hold.
    Made by :func:`fit_type_negative_binomial`.
    """

    types: tuple[str, ...]
    share: NDArray[np.float64]
    dispersion: NDArray[np.float64]
    log_library_mean: NDArray[np.float64]
    log_library_sd: NDArray[np.float64]

    def sample(self, labels: ArrayLike, seed: int) -> sparse.csr_matrix:
        """Draw one cell for each label; int32 counts [N, G] in the order of the labels. Same seed, same cells."""
        rng = np.random.default_rng(seed)
        wanted = np.asarray(labels).astype(str)
        position = {name: index for index, name in enumerate(self.types)}
        rows = np.array([position.get(name, len(self.types)) for name in wanted.tolist()], dtype=np.intp)
        blocks: list[sparse.csr_matrix] = []
        order: list[NDArray[np.intp]] = []
        for row in np.unique(rows):
            cells = np.flatnonzero(rows == row)
            for start in range(0, len(cells), _ROWS):
                block = cells[start : start + _ROWS]
                blocks.append(self._draw(int(row), len(block), rng))
                order.append(block)
        stacked = sparse.vstack(blocks, format="csr")
        return sparse.csr_matrix(stacked[np.argsort(np.concatenate(order))])

    def _draw(self, row: int, cells: int, rng: np.random.Generator) -> sparse.csr_matrix:
        genes = np.flatnonzero(self.share[row] > 0)  # the others are zero in every cell
        library = np.exp(rng.normal(self.log_library_mean[row], self.log_library_sd[row], size=cells))
        rate = library[:, None] * self.share[row, genes]
        alpha = self.dispersion[row, genes]
        spread = np.flatnonzero(alpha > 0)
        # NB = Poisson with a Gamma rate: shape 1/alpha, mean 1.
        shape = 1.0 / alpha[spread]
        gamma = rng.standard_gamma(shape.astype(np.float32), size=(cells, len(spread)), dtype=np.float32)
        rate[:, spread] *= gamma * alpha[spread]
        drawn = sparse.coo_matrix(rng.poisson(rate).astype(np.int32))
        entries = (drawn.data, (drawn.row, genes[drawn.col]))
        return sparse.csr_matrix(entries, shape=(cells, self.share.shape[1]), dtype=np.int32)


def fit_type_negative_binomial(counts: sparse.csr_matrix, labels: ArrayLike) -> TypeNegativeBinomial:
    """Fit by moments, given each cell's library size l_i.

    p_kg = sum_i x_ig / sum_i l_i over the cells of type k, and from E[(x_ig - l_i p)^2] = l_i p + alpha (l_i p)^2:
    alpha_kg = max(0, (sum_i (x_ig - l_i p_kg)^2 - p_kg sum_i l_i) / (p_kg^2 sum_i l_i^2)).
    """
    names = np.asarray(labels).astype(str)
    if len(names) != counts.shape[0]:
        raise ValueError(f"{len(names)} labels for {counts.shape[0]} cells")
    types, codes = np.unique(names, return_inverse=True)
    x = counts.astype(np.float64)
    library = library_size(counts)
    cells = np.arange(len(names))
    member = sparse.csr_matrix(
        (
            np.ones(2 * len(names)),
            (np.concatenate([codes, np.full(len(names), len(types))]), np.concatenate([cells, cells])),
        )
    )  # [K + 1, N]; the last row holds every cell
    sum_l = np.asarray(member @ library)
    sum_l2 = np.asarray(member @ library**2)
    sum_x = (member @ x).toarray()
    sum_x2 = (member @ x.multiply(x).tocsr()).toarray()
    sum_lx = (member @ sparse.diags(library) @ x).toarray()
    p = sum_x / np.maximum(sum_l, 1.0)[:, None]  # a type without any count draws empty cells
    squares = sum_x2 - 2.0 * p * sum_lx + p**2 * sum_l2[:, None]
    expected = p**2 * sum_l2[:, None]
    alpha = np.divide(squares - p * sum_l[:, None], expected, out=np.zeros_like(p), where=expected > 0)
    log_library = np.log(np.maximum(library, 1.0))
    number = np.asarray(member @ np.ones(len(names)))
    mean = np.asarray(member @ log_library) / number
    variance = np.maximum(np.asarray(member @ log_library**2) / number - mean**2, 0.0)
    return TypeNegativeBinomial(
        types=tuple(types.tolist()),
        share=p,
        dispersion=np.maximum(alpha, 0.0),
        log_library_mean=mean,
        log_library_sd=np.sqrt(variance),
    )


@dataclass(frozen=True)
class ClusterNegativeBinomial:
    """A negative binomial around each of some clusters of cells, within their types; made by :func:`fit_clusters`.

    ``members`` says which clusters of ``inner`` a label has, and the share of its cells in each.
    """

    inner: TypeNegativeBinomial
    members: dict[str, tuple[tuple[str, ...], NDArray[np.float64]]]

    def sample(self, labels: ArrayLike, seed: int) -> sparse.csr_matrix:
        """Draw one cell for each label; int32 counts [N, G] in the order of the labels. Same seed, same cells.

        A label that was not there is drawn as its first condition is, and if that was not there either, as any cell.
        """
        wanted = np.asarray(labels).astype(str)
        rng = np.random.default_rng([seed, 5])
        chosen = np.empty(len(wanted), dtype=object)
        for label in np.unique(wanted).tolist():
            known = label if label in self.members else label.split(JOINT)[0]
            places = np.flatnonzero(wanted == label)
            clusters, shares = self.members.get(known, self.members[""])
            # In the right proportions, not only in expectation: chance is not what a baseline is judged for.
            heights = (rng.random() + np.arange(len(places))) / len(places)
            picked = np.searchsorted(np.cumsum(shares), heights * shares.sum(), side="right").clip(
                max=len(clusters) - 1
            )
            chosen[places] = np.array(clusters, dtype=object)[rng.permutation(picked)]
        return self.inner.sample(chosen.astype(str), seed)


def fit_clusters(counts: sparse.csr_matrix, labels: ArrayLike, clusters: int = CLUSTERS) -> ClusterNegativeBinomial:
    """Cluster raw counts [N, G] by k-means on their principal components, within each label, and fit each by moments.

    A label gets its share of the clusters, at least one, and none with fewer than :data:`LEAST` cells on average; a
    cluster that is smaller joins the nearest one of its label.
    """
    names = np.asarray(labels).astype(str)
    points = fit_space(counts).project(counts)
    first = np.array([name.split(JOINT)[0] for name in names.tolist()])
    codes = np.empty(len(names), dtype=object)
    own: dict[str, list[str]] = {}
    for label in np.unique(names).tolist():
        cells = np.flatnonzero(names == label)
        if len(cells) < LEAST:
            continue
        k = max(1, min(round(clusters * len(cells) / len(names)), len(cells) // LEAST))
        parts = _cluster(points[cells], k)
        codes[cells] = [f"{label}{JOINT}{part}" for part in parts.tolist()]
        own[label] = sorted(set(codes[cells].tolist()))
    rare = np.array([code is None for code in codes.tolist()])
    for group in np.unique(first[rare]).tolist():  # too few of their own: they share one with their first condition
        codes[rare & (first == group)] = f"{group}{JOINT}few"
    coded = codes.astype(str)
    inner = fit_type_negative_binomial(counts, coded)
    shares = {name: np.flatnonzero(names == name) for name in np.unique(names).tolist()}
    shares |= {name: np.flatnonzero(first == name) for name in np.unique(first).tolist() if name not in shares}
    shares[""] = np.arange(len(names))
    members = {}
    for name, cells in shares.items():
        if name in np.unique(names[rare]):
            cells = np.flatnonzero(first == name.split(JOINT)[0])
        if len(cells) < LEAST:
            cells = shares[""]
        there, number = np.unique(coded[cells], return_counts=True)
        members[name] = tuple(there.tolist()), number / number.sum()
    return ClusterNegativeBinomial(inner, members)


def _cluster(points: NDArray[np.floating], k: int) -> NDArray[np.intp]:
    """Return the cluster of each point, ``[N]``; clusters that are too small join the nearest large one."""
    if k == 1:
        return np.zeros(len(points), np.intp)
    from sklearn.cluster import KMeans

    found = KMeans(k, n_init=1, random_state=0).fit(points)
    parts = np.asarray(found.labels_, dtype=np.intp)
    large = np.flatnonzero(np.bincount(parts, minlength=k) >= LEAST)
    if len(large) == 0:
        return np.zeros(len(points), np.intp)
    gaps = ((found.cluster_centers_[:, None] - found.cluster_centers_[large][None]) ** 2).sum(-1)
    return np.asarray(large[gaps.argmin(axis=1)][parts], dtype=np.intp)
