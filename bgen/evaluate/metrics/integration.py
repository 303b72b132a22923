"""The figures of scib-metrics for an integration: how well batches mix, and how much biology is left.

The figures are those of the library (extra ``integration``; Luecken et al., "Benchmarking atlas-level data integration
in single-cell genomics", Nature Methods 2022), each from 0 to 1, higher is better. Its total is 0.6 times the mean of
the figures on biology plus 0.4 times the mean of those on batches.

Axes: N cells, D components.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from bgen.errors import UserError

UNINTEGRATED = "PCA"
"""Name of the embedding from which nothing was removed: the baseline, and the library's reference for changes."""

MOST_CELLS = 10_000
NEIGHBOURS = 90
"""Nearest neighbours that the library looks at, at most."""


def require_scib() -> None:
    """Raise UserError if scib-metrics is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import scib_metrics.benchmark  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"scib-metrics cannot be imported ({error}): `pip install 'bgen-flow[integration]'`, or leave --label out."
        ) from None


def scib_figures(
    embeddings: Mapping[str, NDArray[np.float32]], batch: NDArray[np.str_], label: NDArray[np.str_], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Return ``{figure: {embedding: value}}``, the library's means and total last.

    Parameters
    ----------
    embeddings
        ``[N, D]`` each; one of them is :data:`UNINTEGRATED`.
    batch, label
        ``[N]``; cells without a label are left out, and more than 10,000 cells are subsampled.

    Raises
    ------
    UserError
        If the library is missing, or there are too few cells, batches or labels.
    """
    require_scib()
    from scib_metrics.benchmark import Benchmarker

    rows = np.flatnonzero(label != "")
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:MOST_CELLS])
    batches, labels = len(np.unique(batch[rows])), len(np.unique(label[rows]))
    if len(rows) <= NEIGHBOURS or batches < 2 or labels < 2:
        raise UserError(
            f"scib-metrics needs more than {NEIGHBOURS} labelled cells of at least two labels and two batches; there"
            f" are {len(rows)} cells, {labels} labels, {batches} batches. Leave --label out."
        )
    cells = AnnData(
        np.zeros((len(rows), 1), np.float32),
        obs=pd.DataFrame(
            {"batch": pd.Categorical(batch[rows]), "label": pd.Categorical(label[rows])}, index=rows.astype(str)
        ),
        obsm={name: np.ascontiguousarray(points[rows], np.float32) for name, points in embeddings.items()},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jax, scanpy and pandas, about how the library calls them
        benchmark = Benchmarker(
            cells,
            "batch",
            "label",
            list(embeddings),
            pre_integrated_embedding_obsm_key=UNINTEGRATED,
            progress_bar=False,
        )
        benchmark.prepare(_neighbours)
        benchmark.benchmark()
        table: Any = benchmark.get_results()
    return {str(figure): {name: float(table.loc[name, figure]) for name in embeddings} for figure in table.columns}


def _neighbours(points: NDArray[np.float32], k: int) -> Any:
    """Return the ``k`` nearest neighbours (a cell is its own first), exactly: the library's own search is not."""
    from scib_metrics.nearest_neighbors import NeighborsResults
    from sklearn.neighbors import NearestNeighbors

    distances, indices = NearestNeighbors(n_neighbors=k).fit(points).kneighbors(points)
    return NeighborsResults(indices=indices, distances=distances)
