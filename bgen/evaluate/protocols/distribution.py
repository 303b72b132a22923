"""The protocol ``distribution-v1``: do generated cells look like unseen real cells?

Frozen: a change of any figure needs a new protocol id. For each of several seeds, n test cells are drawn and compared
with n generated cells (the model), with n cells of a negative binomial per type (the baseline, fitted on train), and
with n real training cells (the ceiling).

- n is the same everywhere: the figures depend on it.
- Where types are known, every row has the types of those very test cells, as far as it holds enough of each. So no row
wins or loses by its composition, which is the user's choice in generation and chance in a random sample. (Matched
samples
  differ less than independent ones, so MMD^2 and energy distance of equal distributions lie slightly below 0.)
- Embedding, kernel bandwidth and genes come from a random half of train, drawn anew for each seed; the cells of the
  ceiling come from the other half. Principal components follow the noise of the cells that they were fitted on, so
  these lie further out than any new cell. On 2,264 sorted blood cells x 16,791 genes, a ceiling of the fitted cells
  has W2 9.0 and precision 0.3 where new real cells have 6.9 and 0.9: even poor models would seem to reach it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from bgen.errors import UserError
from bgen.evaluate.metrics import counts as count_metrics
from bgen.evaluate.metrics import distribution
from bgen.evaluate.metrics.counts import CountedPopulations
from bgen.evaluate.metrics.metric import Metric
from bgen.evaluate.metrics.registry import choose_metrics
from bgen.evaluate.metrics.space import COMPONENTS, Space, fit_space
from bgen.evaluate.protocols.baselines import TypeNegativeBinomial, fit_type_negative_binomial
from bgen.evaluate.protocols.inputs import Cells, read_cells
from bgen.evaluate.protocols.scores import ROWS, Estimate, Score, Scores

PROTOCOL = "distribution-v1"
MAX_CELLS = 1000  # exact W2 grows with the cube of the number of cells
MIN_CELLS = 20
ROUGH_CELLS = 200
FIT_CELLS = 10_000  # training cells for the embedding and the genes, and for the baseline, at most
BANDWIDTH_CELLS = 1000
EXPRESSED_SHARE = 0.01
CORRELATED_GENES = 100

METRICS: tuple[Metric[CountedPopulations], ...] = (
    replace(choose_metrics("w2")[0], digits=2),  # of logarithms of counts it is some units
    *choose_metrics("mmd2", "energy", "nn_accuracy", "precision", "recall"),
    *choose_metrics("mean_spearman", "mean_rmse", "variance_spearman", "variance_rmse", "zeros_spearman", "zeros_rmse"),
    *choose_metrics("library_ks", "genes_ks", "correlation"),
)


@dataclass(frozen=True)
class Reference:
    """All that training cells fix before anything is measured; made by :func:`fit_reference`."""

    space: Space
    bandwidth: float
    expressed: NDArray[np.intp]
    variable: NDArray[np.intp]


def fit_reference(train: sparse.csr_matrix) -> Reference:
    """Fit embedding and kernel, and choose genes, on raw counts of training cells [N, G]."""
    space = fit_space(train)
    expressed = count_metrics.expressed_genes(train, EXPRESSED_SHARE)
    if len(expressed) < 2:
        raise UserError(f"train: fewer than two genes are expressed in {EXPRESSED_SHARE:.0%} of the cells")
    return Reference(
        space=space,
        bandwidth=distribution.median_bandwidth(space.project(train[:BANDWIDTH_CELLS])),
        expressed=expressed,
        variable=count_metrics.variable_genes(train, CORRELATED_GENES),
    )


def measure(
    reference: Reference,
    real: sparse.csr_matrix,
    other: sparse.csr_matrix,
    metrics: Sequence[Metric[CountedPopulations]] = METRICS,
) -> dict[str, float]:
    """Return every metric of ``other`` against equally many ``real`` cells, by key."""
    x, y = reference.space.project(real), reference.space.project(other)
    evidence = CountedPopulations(x, y, reference.bandwidth, real, other, reference.expressed, reference.variable)
    return {metric.key: metric.compute(evidence) for metric in metrics}


def evaluate(
    train: AnnData,
    test: AnnData,
    generated: AnnData,
    *,
    cell_type: str | None = None,
    seeds: int = 3,
    max_cells: int = MAX_CELLS,
    on_progress: Callable[[int, int], None] | None = None,
    protocol: str = PROTOCOL,
    metrics: Sequence[Metric[CountedPopulations]] = METRICS,
) -> Scores:
    """Score generated cells between baseline and ceiling.

    Parameters
    ----------
    train, test, generated
        Raw integer counts in X, the same genes (by id) in the same order. ``test`` must not have been trained on.
        ``generated`` should have at least as many cells of each type as ``test``, and may hold more than needed.
    cell_type
        obs column of train and test with the types of the baseline; without it all cells are one type.
    seeds
        Subsamples, at least 2.
    max_cells
        n = min(max_cells, cells in test, in generated, in half of train).
    on_progress
        Called with (comparisons done, comparisons in all).
    protocol, metrics
        Another protocol that draws and compares in the same way has its own id and figures.

    Raises
    ------
    UserError
        Genes differ, X is not counts, a column is missing, or there are too few cells.
    """
    if seeds < 2:
        raise UserError(f"seeds must be at least 2, not {seeds}: verdicts need the spread over subsamples")
    sets = {"train": train, "test": test, "generated": generated}
    cells = read_cells(sets, cell_type, typed=("train", "test"))
    limits = {"test": len(cells["test"]), "generated": len(cells["generated"]), "train": len(cells["train"]) // 2}
    n = min(*limits.values(), max_cells)
    if n < MIN_CELLS:
        raise UserError(
            f"{MIN_CELLS} cells at least are needed in test, in generated and in half of train, and max_cells = "
            f"{MIN_CELLS}; there are {limits['test']}, {limits['generated']} and {limits['train']}, and {max_cells}"
        )
    baseline = fit_baseline(cells["train"])
    measured: dict[str, list[dict[str, float]]] = {row: [] for row in ROWS}
    for seed in range(seeds):
        reference, real, others = _draw(cells, baseline, n, seed)
        for done, row in enumerate(ROWS):
            measured[row].append(measure(reference, real, others[row], metrics))
            if on_progress is not None:
                on_progress(seed * len(ROWS) + done + 1, seeds * len(ROWS))
    scores = tuple(
        Score(metric, *(Estimate(tuple(run[metric.key] for run in measured[row])) for row in ROWS))
        for metric in metrics
    )
    setting: dict[str, int | float | str | None] = {
        "genes": int(train.n_vars),
        "train_cells": int(train.n_obs),
        "test_cells": int(test.n_obs),
        "generated_cells": int(generated.n_obs),
        "cell_type": cell_type,
        "components": len(reference.space.components),
    }
    return Scores(protocol, n, seeds, setting, scores, tuple(_notes(cells, n, len(reference.space.components))))


def baseline_cells(train: AnnData, like: AnnData, *, cell_type: str | None = None, seed: int = 0) -> AnnData:
    """Return one cell of the per-type negative binomial, fitted on ``train``, for each cell of ``like``.

    obs holds the type column, in the order of ``like``; var is that of ``train``.
    """
    cells = read_cells({"train": train, "like": like}, cell_type, typed=("train", "like"))
    labels = _labels(cells["like"])
    counts = fit_baseline(cells["train"]).sample(labels, seed)
    drawn = AnnData(X=counts, var=train.var[[]].copy())
    if cell_type is not None:
        drawn.obs[cell_type] = labels
    return drawn


def fit_baseline(train: Cells) -> TypeNegativeBinomial:
    """Fit the baseline on training cells, one type for all where none are known."""
    fit = _rows(train, np.random.default_rng(0).permutation(len(train))[:FIT_CELLS])
    return fit_type_negative_binomial(fit.counts, _labels(fit))


def _draw(
    cells: dict[str, Cells], baseline: TypeNegativeBinomial, n: int, seed: int
) -> tuple[Reference, sparse.csr_matrix, dict[str, sparse.csr_matrix]]:
    """Return the reference, n test cells and, by row, the n cells to compare them with."""
    rng = np.random.default_rng([seed, 1])
    shuffled = rng.permutation(len(cells["train"]))
    middle = len(shuffled) // 2
    other_half = _rows(cells["train"], shuffled[:middle])
    reference = fit_reference(cells["train"].counts[shuffled[middle:][:FIT_CELLS]])
    test = _rows(cells["test"], rng.choice(len(cells["test"]), size=n, replace=False))
    others = {
        "model": _draw_like(test, cells["generated"], rng).counts,
        "baseline": baseline.sample(_labels(test), seed),
        "ceiling": _draw_like(test, other_half, rng).counts,
    }
    return reference, test.counts, others


def _draw_like(test: Cells, pool: Cells, rng: np.random.Generator) -> Cells:
    """Draw as many cells as ``test`` has: of each type as many where both know types, any where a type runs short."""
    order = rng.permutation(len(pool))
    if test.types is not None and pool.types is not None:
        types = pd.Series(pool.types[order])
        wanted = types.map(Counter(test.types.tolist())).fillna(0)
        surplus = (types.groupby(types).cumcount() >= wanted).to_numpy()
        order = np.concatenate([order[~surplus], order[surplus]])
    return _rows(pool, order[: len(test)])


def _rows(cells: Cells, rows: NDArray[np.intp]) -> Cells:
    return Cells(cells.counts[rows], None if cells.types is None else cells.types[rows])


def _labels(cells: Cells) -> NDArray[np.str_]:
    return np.full(len(cells), "all") if cells.types is None else cells.types


def _notes(cells: dict[str, Cells], n: int, components: int) -> list[str]:
    notes = []
    if n < ROUGH_CELLS:
        notes.append(f"Only {n} cells on each side: the figures are rough.")
    if components < COMPONENTS:
        notes.append(f"The data allow {components} principal components instead of {COMPONENTS}.")
    train, test, generated = (cells[name].types for name in ("train", "test", "generated"))
    if test is not None and generated is not None:
        short = _shortage(test, generated, n)
        if short > 0.02:
            notes.append(
                f"Generated cells are too few of some types: {short:.0%} of the {n} compared cells had to be of "
                "another type, which counts against the model. Generate as many of each type as test holds."
            )
    if train is not None and test is not None and (unseen := sorted(set(test.tolist()) - set(train.tolist()))):
        notes.append(f"Types in test that training does not hold, so the baseline draws any cell: {', '.join(unseen)}.")
    return notes


def _shortage(test: NDArray[np.str_], generated: NDArray[np.str_], n: int) -> float:
    """Return the share of n cells with the types of test that the generated cells cannot provide."""
    wanted, there = Counter(test.tolist()), Counter(generated.tolist())
    return sum(max(0.0, count * n / len(test) - there[name]) for name, count in wanted.items()) / n
