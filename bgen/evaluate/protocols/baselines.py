"""The baseline of generated cells: a negative binomial per cell type, with independent genes.

Axes: N cells, G genes, K cell types.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from bgen.evaluate.metrics.space import library_size

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
