"""Was delivered what was asked for? Judges that learn from real cells, and what they say of each condition.

A classifier per categorical condition, and one for all of them together where there are several, is trained on the real
cells that the embedding was fitted on: a random half of the training cells. The model that is judged has seen these
cells too, but the classifier has seen neither the generated cells nor the real ones that stand beside them. Numbers
are read by gradient boosting from the embedding; a library size needs no reading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bgen.evaluate.metrics.conditions import LABEL_METRICS, NUMBER_METRICS, Labelled, Numbered
from bgen.evaluate.metrics.distribution import Points
from bgen.evaluate.metrics.metric import Metric
from bgen.evaluate.metrics.space import Space
from bgen.evaluate.protocols.inputs import JOINT, Cells
from bgen.evaluate.protocols.scores import NAMED, LabelScore, Score
from bgen.genes.expression import library_size

LIBRARY = "library_size"
"""The numeric condition that is read from the counts."""
LEAST_CELLS = 30
"""Compared cells that a label must have to count in a mean over labels."""
LEARNED_CELLS = 5000
"""Real cells that a judge learns from, at most."""
READ_CELLS = 5000
"""Cells of each set that single labels are counted over, at most."""


@dataclass(frozen=True)
class Judges:
    """What reads labels and numbers from coordinates, by condition; made by :func:`fit_judges`."""

    labels: dict[str, Any]
    numbers: dict[str, Any]

    def tell(self, condition: str, points: NDArray[np.floating], counts: Any) -> NDArray[np.float64]:
        """Return the numbers ``[N]`` that cells have, by their coordinates or, for a library size, their counts."""
        if condition == LIBRARY:
            return library_size(counts)
        return np.asarray(self.numbers[condition].predict(points), dtype=np.float64)


def label_columns(cells: Cells) -> dict[str, NDArray[np.str_]]:
    """Return the labels of each categorical condition, and of all together where there are several."""
    columns = dict(cells.labels)
    if len(columns) > 1:
        joint = [JOINT.join(values) for values in zip(*columns.values(), strict=True)]
        columns[" x ".join(columns)] = np.array(joint).astype(str)
    return columns


def fit_judges(space: Space, cells: Cells) -> Judges:
    """Learn from real cells. A condition of which they have one value only has no judge."""
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    some = cells.take(np.random.default_rng(0).permutation(len(cells))[:LEARNED_CELLS])
    points = space.project(some.counts)
    readers, numbers = {}, {}
    for name, column in label_columns(some).items():
        if len(np.unique(column)) > 1:
            model = LogisticRegression(max_iter=200, class_weight="balanced", C=0.1)
            readers[name] = make_pipeline(StandardScaler(), model).fit(points, column)
    for name, values in some.numbers.items():
        known = np.isfinite(values)
        if name != LIBRARY and len(np.unique(values[known])) > 1:
            reader = HistGradientBoostingRegressor(max_iter=60, max_leaf_nodes=15, early_stopping=False, random_state=0)
            numbers[name] = reader.fit(points[known], values[known])
    return Judges(readers, numbers)


def condition_evidence(
    judges: Judges, test: Cells, other: Cells, points: Points
) -> dict[str, tuple[tuple[Metric[Any], ...], Any]]:
    """Return the metrics and the evidence of each condition that can be judged, by its name.

    ``test`` and ``other`` are matched place by place, and ``points`` their coordinates.
    """
    found: dict[str, tuple[tuple[Metric[Any], ...], Any]] = {}
    real_columns, asked_columns = label_columns(test), label_columns(other)
    for name, reader in judges.labels.items():
        labels, number = np.unique(real_columns[name], return_counts=True)
        counted = tuple(labels[number >= LEAST_CELLS].tolist())
        if counted:
            told = reader.predict(points.other)
            labelled = Labelled(points.real, points.other, real_columns[name], asked_columns[name], told, counted)
            found[name] = LABEL_METRICS, labelled.with_distances_of(points)
    for name, asked in other.numbers.items():
        if len(np.unique(asked)) > 1 and np.isfinite(asked).all() and (name == LIBRARY or name in judges.numbers):
            found[name] = NUMBER_METRICS, Numbered(asked, judges.tell(name, points.other, other.counts))
    return found


def named(metric: Metric[Any], condition: str, alone: bool) -> Metric[Any]:
    """Return the metric under the name of its condition; ``alone`` if there is no other of its kind."""
    key = re.sub(r"[^\w.-]+", "_", condition)
    return replace(metric, key=f"{metric.key}_{key}", title=metric.title if alone else f"{metric.title}, {condition}")


def score_labels(
    judges: Judges,
    space: Space,
    generated: Cells,
    real: Sequence[Cells],
    distances: Mapping[str, Mapping[str, Sequence[Labelled]]],
) -> tuple[LabelScore, ...]:
    """Return every label of every condition: agreement of all generated cells beside all unseen real ones.

    Parameters
    ----------
    real
        Sets of cells that the judges have not seen.
    distances
        Condition to row to the evidence of each seed.
    """
    rng = np.random.default_rng(0)
    sets = [generated.take(rng.permutation(len(generated))[:READ_CELLS])]
    sets += [cells.take(rng.permutation(len(cells))[:READ_CELLS]) for cells in real]
    points = [space.project(cells.counts) for cells in sets]
    columns = [label_columns(cells) for cells in sets]
    scores = []
    for name, reader in judges.labels.items():
        told = [reader.predict(p) for p in points]
        for label in sorted({*np.unique(np.concatenate([c[name] for c in columns])).tolist()}):
            hits = [int(((c[name] == label) & (t == label)).sum()) for c, t in zip(columns, told, strict=True)]
            cells = [int((c[name] == label).sum()) for c in columns]
            table = [[hits[0], cells[0] - hits[0]], [sum(hits[1:]), sum(cells[1:]) - sum(hits[1:])]]
            p = float(stats.fisher_exact(np.array(table), "less").pvalue) if cells[0] and sum(cells[1:]) else 1.0
            far = {kind: _means(distances.get(name, {}), kind, label) for kind in ("energies", "transports")}
            scores.append(
                LabelScore(
                    name, label, hits[0], cells[0], sum(hits[1:]), sum(cells[1:]), p, far["energies"], far["transports"]
                )
            )
    return tuple(replace(score, p=min(1.0, score.p * len(scores))) for score in scores)


def _means(rows: Mapping[str, Sequence[Labelled]], kind: str, label: str) -> dict[str, float]:
    """Return row to the mean over seeds of a distance within a label, where every row has it."""
    values = {row: [getattr(e, kind)[label] for e in runs if label in getattr(e, kind)] for row, runs in rows.items()}
    return {row: float(np.mean(v)) for row, v in values.items()} if all(values.values()) else {}


def sentences(scores: Mapping[str, Sequence[Score]], labels: Sequence[LabelScore]) -> tuple[str, ...]:
    """Say of each condition whether it was delivered; the first score of each is the one that tells."""
    conditions = list(dict.fromkeys([*(label.condition for label in labels), *scores]))
    told = []
    for name in conditions:
        own = [label for label in labels if label.condition == name]
        first = scores[name][0] if name in scores else None
        told.append(_numbers(name, first) if first is not None and not own else _labels(name, first, own))
    return tuple(told)


def _numbers(name: str, score: Score) -> str:
    return (
        f"Asked for {name}, {_delivered(score, 0.0)}: its rank correlation with what was delivered is"
        f" {score.model.mean:.2f}, of real cells {score.ceiling.mean:.2f}."
    )


def _labels(name: str, score: Score | None, labels: Sequence[LabelScore]) -> str:
    missed = [label for label in labels if label.missed]
    begin = f"Asked for {name} ({len(labels)} labels), {_delivered(score, len(missed) / len(labels))}"
    if missed:
        begin += f" for {', '.join(label.words for label in missed[:NAMED])}{', ...' if len(missed) > NAMED else ''}"
    if score is None:
        return f"{begin}: no label has {LEAST_CELLS} compared cells."
    return (
        f"{begin}: a classifier trained on real cells agrees with {score.model.mean:.2f} of the generated and"
        f" {score.ceiling.mean:.2f} of the real cells, as a mean over labels."
    )


def _delivered(score: Score | None, missed: float) -> str:
    told = None if score is None else score.judgement
    if missed > 0:
        return "not delivered" if missed > 0.5 else "delivered but"
    if told is None or not (told.equivalent or told.differs):
        return "cannot tell whether it was delivered"
    return "delivered" if told.equivalent else "not wholly delivered"
