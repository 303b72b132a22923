"""The protocol ``distribution-v2``: do generated cells look like unseen real cells, and are they what was asked for?

Frozen: a change of any figure needs a new protocol id. For each of several seeds, n test cells are drawn and compared
with n generated cells (the model), with n cells of a negative binomial around each of 50 clusters of the training cells
(the baseline), and with n real training cells (the ceiling).

- n is the same everywhere: the figures depend on it.
- Where conditions are known, every row has, place by place, the conditions of those very test cells, as far as it holds
  enough of each. So no row wins or loses by its composition, which is the user's choice in generation and chance in a
  random sample. (Matched samples differ less than independent ones, so MMD^2 and energy distance of equal distributions
  lie slightly below 0.)
- Embedding, kernel bandwidth, genes and judges of conditions come from a random half of train, drawn anew for each
  seed; the cells of the ceiling come from the other half. Principal components follow the noise of the cells that they
  were fitted on, so these lie further out than any new cell. On 2,264 sorted blood cells x 16,791 genes, a ceiling of
  the fitted cells has W2 9.0 and precision 0.3 where new real cells have 6.9 and 0.9: even poor models would seem to
  reach it.
- Verdicts are statistics: :mod:`bgen.evaluate.protocols.verdicts`. Conditions:
  :mod:`bgen.evaluate.protocols.conditions`.

What differs from ``distribution-v1``: conditions, classifiers and doublets; the baseline, which was a negative binomial
per type; the verdicts, which were three standard deviations of three subsamples. Figures of the measures that v1 had
are comparable, those of its baseline are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from bgen.errors import UserError
from bgen.evaluate.metrics import counts as count_metrics
from bgen.evaluate.metrics import distribution
from bgen.evaluate.metrics.classifiers import DoubletCaller, fit_doublets
from bgen.evaluate.metrics.conditions import Labelled, Numbered
from bgen.evaluate.metrics.counts import CountedPopulations
from bgen.evaluate.metrics.memorisation import memorisation
from bgen.evaluate.metrics.metric import Metric
from bgen.evaluate.metrics.registry import choose_metrics
from bgen.evaluate.metrics.space import COMPONENTS, Space, fit_space
from bgen.evaluate.protocols import conditions as asked
from bgen.evaluate.protocols.baselines import ClusterNegativeBinomial, fit_clusters
from bgen.evaluate.protocols.inputs import JOINT, Cells, read_cells
from bgen.evaluate.protocols.scores import Estimate, NumberScore, Score, Scores
from bgen.evaluate.protocols.verdicts import ROWS, errors_of, half_gaps

PROTOCOL = "distribution-v2"
MAX_CELLS = 1000  # exact W2 grows with the cube of the number of cells
MIN_CELLS = 20
ROUGH_CELLS = 200
FIT_CELLS = 10_000  # training cells for the embedding and the genes, and for the baseline, at most
BANDWIDTH_CELLS = 1000
EXPRESSED_SHARE = 0.01
CORRELATED_GENES = 100
SHOWN_CELLS = 150  # of a numeric condition, for a picture

METRICS: tuple[Metric[CountedPopulations], ...] = (
    replace(choose_metrics("w2")[0], digits=2),  # of logarithms of counts it is some units
    *choose_metrics("mmd2", "energy", "nn_accuracy", "precision", "recall", "classifier", "boosting", "doublets"),
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
    doublets: DoubletCaller


@dataclass(frozen=True)
class _Drawn:
    """What one seed compares: the reference, the judges of conditions, n test cells and n cells of each row."""

    reference: Reference
    judges: asked.Judges
    test: Cells
    others: dict[str, Cells]
    unused: Cells
    """Real training cells that neither reference nor judges have seen."""


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
        doublets=fit_doublets(train),
    )


def gather(reference: Reference, real: sparse.csr_matrix, other: sparse.csr_matrix) -> CountedPopulations:
    """Return the evidence of ``other`` against equally many ``real`` cells, both raw counts."""
    x, y = reference.space.project(real), reference.space.project(other)
    called = reference.doublets.call(other)
    return CountedPopulations(x, y, reference.bandwidth, real, other, reference.expressed, reference.variable, called)


def measure(
    reference: Reference,
    real: sparse.csr_matrix,
    other: sparse.csr_matrix,
    metrics: Sequence[Metric[CountedPopulations]] = METRICS,
) -> dict[str, float]:
    """Return every metric of ``other`` against equally many ``real`` cells, by key."""
    evidence = gather(reference, real, other)
    return {metric.key: metric.compute(evidence) for metric in metrics}


def evaluate(
    train: AnnData,
    test: AnnData,
    generated: AnnData,
    *,
    cell_type: str | None = None,
    conditions: Sequence[str] = (),
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
        obs column of train and test with the types of the baseline; without it all cells are one type. A condition,
        where generated cells have the column too.
    conditions
        Further obs columns that generated cells were asked for. Those count that all three sets have; numbers are
        numbers, and ``library_size`` is read from the counts.
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
    cells = read_cells(sets, cell_type, ("train", "test"), conditions)
    limits = {"test": len(cells["test"]), "generated": len(cells["generated"]), "train": len(cells["train"]) // 2}
    n = min(*limits.values(), max_cells)
    if n < MIN_CELLS:
        raise UserError(
            f"{MIN_CELLS} cells at least are needed in test, in generated and in half of train, and max_cells = "
            f"{MIN_CELLS}; there are {limits['test']}, {limits['generated']} and {limits['train']}, and {max_cells}"
        )
    baseline = fit_baseline(cells["train"])
    gathered = _Gathered(metrics)
    total = seeds * (len(ROWS) + 1) + 1
    first: _Drawn | None = None
    for seed in range(seeds):
        drawn = _draw(cells, baseline, n, seed)

        def advance(done: int, seed: int = seed) -> None:
            if on_progress is not None:
                on_progress(seed * (len(ROWS) + 1) + done, total)

        gathered.add(drawn, np.random.default_rng([seed, 4]), advance)
        first = first or drawn
    assert first is not None
    components = len(first.reference.space.components)
    by_condition = gathered.condition_scores()
    labels = asked.score_labels(
        first.judges, first.reference.space, cells["generated"], [cells["test"], first.unused], gathered.labelled
    )
    copied = memorisation(*(cells[name].counts for name in ("train", "test", "generated")))
    if on_progress is not None:
        on_progress(total, total)
    setting: dict[str, int | float | str | None] = {
        "genes": int(train.n_vars),
        "train_cells": int(train.n_obs),
        "test_cells": int(test.n_obs),
        "generated_cells": int(generated.n_obs),
        "cell_type": cell_type,
        "components": components,
    }
    return Scores(
        protocol,
        n,
        seeds,
        setting,
        (*gathered.scores(), *(score for scores in by_condition.values() for score in scores)),
        notes=tuple(_notes(cells, n, components)),
        labels=labels,
        numbers=tuple(gathered.numbers),
        asked=asked.sentences(by_condition, labels),
        copied=copied,
    )


class _Gathered:
    """Figures and squared errors of all seeds so far, by group of metrics: "" or the name of a condition."""

    def __init__(self, metrics: Sequence[Metric[CountedPopulations]]) -> None:
        self.metrics: dict[str, tuple[Metric[Any], ...]] = {"": tuple(metrics)}
        self.figures: dict[str, list[dict[str, list[float]]]] = {}
        self.gaps: dict[str, list[NDArray[np.float64]]] = {}
        self.labelled: dict[str, dict[str, list[Labelled]]] = {}
        self.numbers: list[NumberScore] = []

    def add(self, drawn: _Drawn, rng: np.random.Generator, advance: Callable[[int], None]) -> None:
        """Measure what one seed compares."""
        groups: dict[str, dict[str, Any]] = {}
        for done, row in enumerate(ROWS):
            evidence = gather(drawn.reference, drawn.test.counts, drawn.others[row].counts)
            groups.setdefault("", {})[row] = evidence
            told = asked.condition_evidence(drawn.judges, drawn.test, drawn.others[row], evidence)
            for name, (metrics, own) in told.items():
                groups.setdefault(name, {})[row] = own
                self.metrics[name] = metrics
            for name, rows in groups.items():
                rows[f"figures {row}"] = [metric.compute(rows[row]) for metric in self.metrics[name] if row in rows]
            advance(done + 1)
        for name, rows in groups.items():
            if not all(row in rows for row in ROWS):
                continue
            self.figures.setdefault(name, []).append({row: rows[f"figures {row}"] for row in ROWS})
            gaps = half_gaps({row: rows[row] for row in ROWS}, self.metrics[name], rng, len(drawn.test))
            self.gaps.setdefault(name, []).append(gaps)
            if isinstance(rows["model"], Numbered) and not any(number.condition == name for number in self.numbers):
                cells = np.arange(min(SHOWN_CELLS, len(drawn.test)))
                shown = [getattr(rows[row], what)[cells] for row in ("model", "ceiling") for what in ("asked", "told")]
                self.numbers.append(NumberScore(name, *(tuple(values.tolist()) for values in shown)))
            if isinstance(rows["model"], Labelled):
                for row in ROWS:
                    self.labelled.setdefault(name, {}).setdefault(row, []).append(rows[row])
        advance(len(ROWS) + 1)

    def scores(self, name: str = "") -> list[Score]:
        """Return the scores of one group."""
        gaps = np.concatenate(self.gaps[name])
        scores = []
        for place, metric in enumerate(self.metrics[name]):
            rows = [Estimate(tuple(run[row][place] for run in self.figures[name])) for row in ROWS]
            scores.append(Score(metric, rows[0], rows[1], rows[2], errors_of(gaps[:, :, place])))
        return scores

    def condition_scores(self) -> dict[str, list[Score]]:
        """Return the scores of each condition, by its name."""
        names = [name for name in self.figures if name]
        alone = {kind: sum(self.metrics[name][0].key == kind for name in names) == 1 for kind in ("agreement", "rank")}
        return {
            name: [
                replace(score, metric=asked.named(score.metric, name, alone[self.metrics[name][0].key]))
                for score in self.scores(name)
            ]
            for name in names
        }


def baseline_cells(
    train: AnnData, like: AnnData, *, cell_type: str | None = None, conditions: Sequence[str] = (), seed: int = 0
) -> AnnData:
    """Return one cell of the baseline, fitted on ``train``, for each cell of ``like``.

    obs holds the conditions that both have, in the order of ``like``; var is that of ``train``.
    """
    cells = read_cells({"train": train, "like": like}, cell_type, ("train", "like"), conditions)
    counts = fit_baseline(cells["train"]).sample(_labels(cells["like"]), seed)
    drawn = AnnData(X=counts, var=train.var[[]].copy())
    for name, column in (cells["like"].labels | cells["like"].numbers).items():  # type: ignore[operator]
        drawn.obs[name] = column
    return drawn


def fit_baseline(train: Cells) -> ClusterNegativeBinomial:
    """Fit the baseline on training cells, one type for all where none are known."""
    fit = train.take(np.random.default_rng(0).permutation(len(train))[:FIT_CELLS])
    return fit_clusters(fit.counts, _labels(fit))


def _draw(cells: dict[str, Cells], baseline: ClusterNegativeBinomial, n: int, seed: int) -> _Drawn:
    rng = np.random.default_rng([seed, 1])
    shuffled = rng.permutation(len(cells["train"]))
    middle = len(shuffled) // 2
    other_half = cells["train"].take(shuffled[:middle])
    fitted = cells["train"].take(shuffled[middle:][:FIT_CELLS])
    reference = fit_reference(fitted.counts)
    test = cells["test"].take(rng.choice(len(cells["test"]), size=n, replace=False))
    others = {
        "model": _draw_like(test, cells["generated"], rng),
        "baseline": replace(test, counts=baseline.sample(_labels(test), seed)),
        "ceiling": _draw_like(test, other_half, rng),
    }
    return _Drawn(reference, asked.fit_judges(reference.space, fitted), test, others, other_half)


def _draw_like(test: Cells, pool: Cells, rng: np.random.Generator) -> Cells:
    """Draw a cell for each place of ``test``: with its conditions; or its first one, or any, where these run short."""
    order = rng.permutation(len(pool))
    if test.types is None or pool.types is None:
        return pool.take(order[: len(test)])
    rows = np.full(len(test), -1)
    left = np.ones(len(pool), bool)
    for wanted, there in ((test.types, pool.types), (_first(test.types), _first(pool.types))):
        for label in np.unique(wanted[rows < 0]).tolist():
            places = np.flatnonzero((wanted == label) & (rows < 0))
            found = order[left[order] & (there[order] == label)][: len(places)]
            rows[places[: len(found)]] = found
            left[found] = False
    empty = np.flatnonzero(rows < 0)
    rows[empty] = order[left[order]][: len(empty)]
    return pool.take(rows)


def _first(types: NDArray[np.str_]) -> NDArray[np.str_]:
    return np.array([name.split(JOINT)[0] for name in types.tolist()]).astype(str)


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
    for name, column in asked.label_columns(cells["test"]).items():
        rare = [
            f"{label} {count}" for label, count in sorted(Counter(column.tolist()).items()) if count < asked.LEAST_CELLS
        ]
        if rare:
            shown = ", ".join(rare[:20]) + (", ..." if len(rare) > 20 else "")
            notes.append(f"Labels of {name} with few test cells, judged by agreement only: {shown}.")
    return notes


def _shortage(test: NDArray[np.str_], generated: NDArray[np.str_], n: int) -> float:
    """Return the share of n cells with the types of test that the generated cells cannot provide."""
    wanted, there = Counter(test.tolist()), Counter(generated.tolist())
    return sum(max(0.0, count * n / len(test) - there[name]) for name, count in wanted.items()) / n
