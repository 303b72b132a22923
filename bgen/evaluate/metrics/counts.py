"""Whether generated counts look like counts from the instrument: per gene, per cell and between genes.

Counts are raw, sparse [N, G]. Nothing here needs an embedding, so these figures catch what principal components hide:
wrong sparsity, wrong noise, wrong library sizes, lost co-expression.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, stats

from bgen.evaluate.metrics.classifiers import auc, held_out_boosted, held_out_linear
from bgen.evaluate.metrics.distribution import Populations
from bgen.evaluate.metrics.metric import Better, Metric
from bgen.genes.expression import library_size, log_cp10k

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class CountedPopulations(Populations):
    """Populations with their raw counts.

    Attributes
    ----------
    real_counts, other_counts
        ``[N, G]``.
    expressed
        Genes whose moments are compared.
    variable
        Genes whose correlations are compared.
    called
        Which of the other cells are called doublets, bool ``[N]``; None where nobody looked.
    """

    real_counts: sparse.csr_matrix
    other_counts: sparse.csr_matrix
    expressed: NDArray[np.intp]
    variable: NDArray[np.intp]
    called: NDArray[np.bool_] | None = None

    def take(self, rows: NDArray[np.intp]) -> Self:
        """Return the cells of some places; classifiers are not trained again."""
        part = super().take(rows)
        for name in ("linear", "boosted"):
            if name in self.__dict__:
                part.__dict__[name] = self.__dict__[name][:, rows]
        return part

    def fields_of(self, rows: NDArray[np.intp]) -> dict[str, Any]:
        """Return the fields that hold something of each cell, for the cells of some places."""
        called = None if self.called is None else self.called[rows]
        counts = {"real_counts": self.real_counts[rows], "other_counts": self.other_counts[rows]}
        return super().fields_of(rows) | counts | {"called": called}

    @cached_property
    def linear(self) -> NDArray[np.float64]:
        """See :func:`bgen.evaluate.metrics.classifiers.held_out_linear`."""
        return held_out_linear(self.real_counts, self.other_counts)

    @cached_property
    def boosted(self) -> NDArray[np.float64]:
        """See :func:`bgen.evaluate.metrics.classifiers.held_out_boosted`."""
        return held_out_boosted(self.real, self.other)

    @cached_property
    def moment_scores(self) -> dict[str, float]:
        """See :func:`moment_scores`."""
        return moment_scores(gene_moments(self.real_counts), gene_moments(self.other_counts), self.expressed)


@dataclass(frozen=True)
class GeneMoments:
    """Per gene, over ``cells`` cells: mean count, sample variance and share of zeros; each float64 [G]."""

    cells: int
    mean: Array
    variance: Array
    zeros: Array


def gene_moments(counts: sparse.csr_matrix) -> GeneMoments:
    """Return mean, variance (denominator N - 1) and share of zeros of each gene."""
    cells = counts.shape[0]
    if cells < 2:
        raise ValueError("a variance needs at least two cells")
    values = counts.astype(np.float64)
    mean = np.asarray(values.mean(axis=0)).ravel()
    square = np.asarray(values.multiply(values).mean(axis=0)).ravel()
    variance = np.maximum(square - mean**2, 0.0) * (cells / (cells - 1))
    zeros = 1.0 - values.count_nonzero(axis=0) / cells
    return GeneMoments(cells=cells, mean=mean, variance=variance, zeros=zeros)


def genes_per_cell(counts: sparse.csr_matrix) -> NDArray[np.int64]:
    """Return the number of genes with a count, per cell, int64 [N]."""
    return np.asarray(counts.count_nonzero(axis=1), dtype=np.int64)


def spearman(a: Array, b: Array) -> float:
    """Return Spearman's rank correlation; 0 where one side is constant and so says nothing about the order."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(stats.spearmanr(a, b).statistic)


def log10_rmse(a: Array, b: Array, floor: float) -> float:
    """Return the root mean squared difference of log10(a + floor) and log10(b + floor): 0.3 is a factor of 2."""
    return float(np.sqrt(np.mean((np.log10(a + floor) - np.log10(b + floor)) ** 2)))


def moment_scores(real: GeneMoments, generated: GeneMoments, genes: NDArray[np.intp]) -> dict[str, float]:
    """Compare moments over the given genes: rank correlation and root mean squared error.

    Means and variances are compared in log10. Half a count in the whole sample, 0.5 / N, is added to both: that is the
    resolution of N cells, and it keeps genes finite that one side never saw.
    """
    if real.cells != generated.cells:
        raise ValueError(f"moments are over {real.cells} and {generated.cells} cells: use equally many")
    floor = 0.5 / real.cells
    pairs = {name: (getattr(real, name)[genes], getattr(generated, name)[genes]) for name in ("mean", "variance")}
    zeros_real, zeros_generated = real.zeros[genes], generated.zeros[genes]
    scores = {f"{name}_spearman": spearman(a, b) for name, (a, b) in pairs.items()}
    scores |= {f"{name}_rmse": log10_rmse(a, b, floor) for name, (a, b) in pairs.items()}
    scores["zeros_spearman"] = spearman(zeros_real, zeros_generated)
    scores["zeros_rmse"] = float(np.sqrt(np.mean((zeros_real - zeros_generated) ** 2)))
    return scores


def ks_distance(a: NDArray[np.float64] | NDArray[np.int64], b: NDArray[np.float64] | NDArray[np.int64]) -> float:
    """Return the Kolmogorov-Smirnov distance: the largest gap between two empirical distribution functions, 0 to 1."""
    first, second = np.sort(a), np.sort(b)
    every = np.concatenate([first, second])
    shares = (np.searchsorted(side, every, side="right") / len(side) for side in (first, second))
    return float(np.abs(next(shares) - next(shares)).max())


def library_ks(real: sparse.csr_matrix, generated: sparse.csr_matrix) -> float:
    """Return the Kolmogorov-Smirnov distance between library sizes."""
    return ks_distance(library_size(real), library_size(generated))


def genes_ks(real: sparse.csr_matrix, generated: sparse.csr_matrix) -> float:
    """Return the Kolmogorov-Smirnov distance between numbers of genes per cell."""
    return ks_distance(genes_per_cell(real), genes_per_cell(generated))


def expressed_genes(train: sparse.csr_matrix, share: float) -> NDArray[np.intp]:
    """Return the genes that at least ``share`` of the training cells express."""
    return np.flatnonzero(1.0 - gene_moments(train).zeros >= share)


def variable_genes(train: sparse.csr_matrix, count: int) -> NDArray[np.intp]:
    """Return the ``count`` genes whose log1p CP10k varies most over the training cells, in order of the gene axis."""
    variance = gene_moments(log_cp10k(train)).variance
    return np.sort(np.argsort(-variance, kind="stable")[:count])


def correlation(counts: sparse.csr_matrix, genes: NDArray[np.intp]) -> Array:
    """Return the Pearson correlations of log1p CP10k between the given genes; a constant gene correlates with none."""
    values = log_cp10k(counts)[:, genes].toarray().astype(np.float64)
    values -= values.mean(axis=0)
    norm = np.sqrt((values**2).sum(axis=0))
    values = np.divide(values, norm, out=np.zeros_like(values), where=norm > 0)
    return values.T @ values


def correlation_difference(real: sparse.csr_matrix, generated: sparse.csr_matrix, genes: NDArray[np.intp]) -> float:
    """Return ||C_generated - C_real||_F / ||C_real||_F over the correlations between different genes.

    0 is equal; 1 is what independent genes would give.
    """
    of_real, of_generated = correlation(real, genes), correlation(generated, genes)
    np.fill_diagonal(of_real, 0.0)
    np.fill_diagonal(of_generated, 0.0)
    norm = float(np.linalg.norm(of_real))
    if norm == 0:
        raise ValueError("the chosen genes do not vary in the real cells, so their correlations cannot be compared")
    return float(np.linalg.norm(of_generated - of_real)) / norm


def doublets(evidence: CountedPopulations) -> float:
    """Return the share of other cells that are called doublets (see :mod:`bgen.evaluate.metrics.classifiers`)."""
    if evidence.called is None:
        raise ValueError("nobody looked for doublets: the evidence says of no cell whether it is one")
    return float(evidence.called.mean())


def _moment(key: str, title: str, better: Better, meaning: str, margin: float) -> Metric[CountedPopulations]:
    erratic = key in ("mean_rmse", "variance_rmse")
    return Metric(key, title, better, 3, meaning, lambda p: p.moment_scores[key], margin, erratic=erratic)


METRICS: tuple[Metric[CountedPopulations], ...] = (
    _moment("mean_spearman", "gene mean, rank", "higher", "Rank correlation over genes of the mean count.", 0.02),
    _moment(
        "mean_rmse", "gene mean, error", "lower", "Error of log10 mean count over genes; 0.3 is a factor of 2.", 0.03
    ),
    _moment("variance_spearman", "variance, rank", "higher", "Rank correlation over genes of the variance.", 0.03),
    _moment(
        "variance_rmse", "variance, error", "lower", "Error of log10 variance over genes; 0.3 is a factor of 2.", 0.06
    ),
    _moment(
        "zeros_spearman", "zeros, rank", "higher", "Rank correlation over genes of the share of zero counts.", 0.02
    ),
    _moment("zeros_rmse", "zeros, error", "lower", "Error over genes of the share of zero counts.", 0.005),
    Metric(
        "library_ks",
        "library size, KS",
        "lower",
        3,
        "Largest gap between the distributions of total counts per cell.",
        lambda p: library_ks(p.real_counts, p.other_counts),
        0.08,
    ),
    Metric(
        "genes_ks",
        "genes/cell, KS",
        "lower",
        3,
        "Largest gap between the distributions of genes seen per cell.",
        lambda p: genes_ks(p.real_counts, p.other_counts),
        0.08,
    ),
    Metric(
        "correlation",
        "gene correlation",
        "lower",
        3,
        "Relative error of correlations between variable genes.",
        lambda p: correlation_difference(p.real_counts, p.other_counts, p.variable),
        0.06,
    ),
    Metric(
        "classifier",
        "classifier",
        "lower",
        3,
        "How well logistic regression on all genes tells generated from real cells; 0.5 is chance.",
        lambda p: auc(p.linear),
        0.08,
    ),
    Metric(
        "boosting",
        "boosted trees",
        "lower",
        3,
        "The same by gradient boosting on the embedding.",
        lambda p: auc(p.boosted),
        0.08,
    ),
    Metric("doublets", "doublets", "lower", 3, "Share of cells that look like two real ones in one.", doublets, 0.02),
)
