"""The protocol ``perturbation-v3``: do predicted perturbed cells look like held-out real ones?

Frozen: a change of any figure needs a new protocol id. For each held-out perturbation and each of several seeds the
real perturbed and control cells are split into two halves: one is what predictions are compared with, the other is the
ceiling, and chooses the genes with the clearest effects. So no row is measured on noise that chose its genes.

- An effect is the difference of mean log(1 + counts per 10,000) between perturbed and control cells. The control cells
are real and the same in every row, even for a model that would predict its own (otherwise a model could win or lose the
discrimination score by scaling its controls).
- Control cells that the model and the baselines were trained on, too (``shared_controls``: doses of a drug with few
  vehicle cells), are not split: all of them are the reference of every effect, in both halves. With some 30 cells on
  either side, the noise of two references would be larger than the effect of the drug. One reference adds the same
  noise to all real and predicted effects: rows compare with each other, but their correlations not with those of other
  screens. Control cells moved by an effect that was measured against themselves would be closer to the truth than any
  sample can be, so baselines are then real cells (``populations``): of the nearest dose, of all training perturbations.
- Callers predict as many cells as there are control cells to predict from (more only where the real ones need it): a
  control cell that is used twice makes a population narrower. Up to ``perturbation-v2`` they were at least 500.
- A baseline is an effect that needs no model: "control copy" (none) and what the caller gives: "train mean" (the
  average effect over training perturbations), "additive", "same in training", "nearest dose". As cells it is the real
  control cells moved by the effect.
- The slope is sum <predicted, real> / sum <other half, real> over perturbations and genes: the noise of the two halves
  is independent, so that it does not enter the denominator.
- Verdicts come from a paired bootstrap over perturbations of the difference to each baseline.

Axes: N cells, G genes, P held-out perturbations, D components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from rich.table import Table

from bgen.arrays import F64
from bgen.errors import UserError
from bgen.evaluate.metrics.effects import TOP, PredictedEffect
from bgen.evaluate.metrics.metric import Metric
from bgen.evaluate.metrics.registry import choose_metrics
from bgen.evaluate.metrics.space import Space, fit_space, log_cp10k

PROTOCOL = "perturbation-v3"
MAX_CELLS = 500
MIN_CELLS = 10
BOOTSTRAPS = 2000
CONTROL_COPY, TRAIN_MEAN, MODEL, CEILING = "control copy", "train mean", "model", "ceiling"

METRICS: tuple[Metric[PredictedEffect], ...] = (
    *choose_metrics("pearson", "pearson_top", "direction", "slope"),
    replace(
        choose_metrics("energy")[0],
        title="E-distance",
        meaning="Energy distance of predicted and real perturbed cells.",
    ),
    *choose_metrics("discrimination"),
)


@dataclass(frozen=True)
class HeldOut:
    """One held-out perturbation.

    Attributes
    ----------
    label
        Its name.
    real, control
        Counts ``[N, G]`` of real perturbed cells, and of real control cells of the same kind.
    predicted
        Counts of predicted cells, at least as many as half of ``real``.
    baselines
        Name to effect ``[G]``, without "control copy".
    targets
        Genes that were perturbed themselves: the discrimination score leaves them out.
    shared_controls
        Whether ``control`` was trained on, too.
    populations
        Name of a baseline to counts of the real cells that it consists of; others are control cells moved by it.
    """

    label: str
    real: sp.csr_matrix
    control: sp.csr_matrix
    predicted: sp.csr_matrix
    baselines: Mapping[str, NDArray[np.float64]]
    targets: NDArray[np.int64]
    shared_controls: bool = False
    populations: Mapping[str, sp.csr_matrix] = field(default_factory=dict)


@dataclass(frozen=True)
class PerturbationScores:
    """What was found.

    Attributes
    ----------
    values
        Row (model, baselines, ceiling) to metric to ``[seeds, P]``; NaN where a row has no such figure.
    predicted, real
        Effects ``[P, G]``, the real ones of all held-out cells.
    """

    labels: tuple[str, ...]
    values: dict[str, dict[str, NDArray[np.float64]]]
    predicted: NDArray[np.float64]
    real: NDArray[np.float64]
    protocol: str = PROTOCOL
    metrics: tuple[Metric[Any], ...] = METRICS

    def mean(self, row: str, key: str) -> float:
        """Mean over perturbations and seeds."""
        return float(np.nanmean(self.values[row][key]))

    def interval(self, row: str, key: str) -> tuple[float, float]:
        """95 % interval of the mean: bootstrap over perturbations, of their means over seeds."""
        if key == "slope":
            draws = self._slopes(row)
        else:
            values = self.values[row][key]
            means = np.nanmean(values[:, np.isfinite(values).any(0)], 0)
            draws = means[_draws(len(means))].mean(1)
        low, high = np.quantile(draws, [0.025, 0.975])
        return float(low), float(high)

    def verdict(self, baseline: str, metric: Metric[Any]) -> str:
        """Compare the model with a baseline: 95 % interval of a paired bootstrap over perturbations."""
        if metric.key == "slope":
            return self._slope_verdict(baseline)
        difference = self.values[MODEL][metric.key].mean(0) - self.values[baseline][metric.key].mean(0)
        if metric.better == "lower":
            difference = -difference
        difference = difference[np.isfinite(difference)]
        if len(difference) < 2:
            return "too few perturbations to tell"
        return _in_words(difference[_draws(len(difference))].mean(1))

    def _slope_verdict(self, baseline: str) -> str:
        """Compare distances from 1, of which only the mean over perturbations has a meaning."""
        off = {row: np.abs(self._slopes(row) - 1) for row in (MODEL, baseline)}
        return _in_words(off[baseline] - off[MODEL])

    def _slopes(self, row: str) -> NDArray[np.float64]:
        """Return bootstrapped slopes: ratios of sums over perturbations, of those that have the row."""
        products, size = self.values[row]["slope"].mean(0), self.values[CEILING]["slope"].mean(0)
        there = np.isfinite(products)
        draws = _draws(int(there.sum()))
        slopes: NDArray[np.float64] = products[there][draws].mean(1) / size[there][draws].mean(1)
        return slopes

    def sentences(self) -> list[str]:
        """Say in plain words where the model stands against each baseline."""
        said = []
        for row in self.values:
            if row in (MODEL, CEILING):
                continue
            by_verdict: dict[str, list[str]] = {}
            for metric in self.metrics:
                if np.isfinite(self.values[row][metric.key]).any():
                    by_verdict.setdefault(self.verdict(row, metric), []).append(metric.title)
            parts = "; ".join(f"{verdict} it in {', '.join(titles)}" for verdict, titles in by_verdict.items())
            said.append(f"{row}: the model is {parts}.")
        return said

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        rows = {
            row: {
                key: {
                    "mean": _number(self.mean(row, key)),
                    "interval": [_number(v) for v in self.interval(row, key)],
                    "by_seed": [_number(v) for v in np.nanmean(v, 1)],
                    "by_perturbation": [_number(v) for v in v.mean(0)],
                }
                for key, v in figures.items()
                if np.isfinite(v).any()
            }
            for row, figures in self.values.items()
        }
        return {"protocol": self.protocol, "perturbations": list(self.labels), "rows": rows, "words": self.sentences()}

    def table(self) -> Table:
        """Return a table: a row per model, baseline and ceiling."""
        seeds, n = next(iter(self.values[MODEL].values())).shape
        table = Table(
            title=f"Scores ({self.protocol})",
            caption=f"Means over {n} held-out perturbations and {seeds} seeds, with 95 % intervals over perturbations.",
            box=None,
            pad_edge=False,
        )
        table.add_column("", no_wrap=True)
        for metric in self.metrics:
            table.add_column(metric.title, justify="right")
        for row, figures in self.values.items():
            cells = []
            for metric in self.metrics:
                if np.isfinite(figures[metric.key]).any():
                    low, high = self.interval(row, metric.key)
                    digits = metric.digits
                    cells.append(f"{self.mean(row, metric.key):.{digits}f}\n{low:.{digits}f}..{high:.{digits}f}")
                else:
                    cells.append("-")
            table.add_row(row, *cells)
        return table


def join(parts: Sequence[PerturbationScores], along: Literal["seeds", "perturbations"]) -> PerturbationScores:
    """Join scores: of the same perturbations from several trainings, or of several perturbations.

    A row that a part does not have is NaN there.
    """
    rows = list(dict.fromkeys(row for part in parts for row in part.values))
    rows = [row for row in rows if row != CEILING] + [CEILING]

    def values(part: PerturbationScores, row: str, key: str) -> NDArray[np.float64]:
        return part.values[row][key] if row in part.values else np.full_like(part.values[MODEL][key], np.nan)

    axis = 0 if along == "seeds" else 1
    joined = {
        row: {key: np.concatenate([values(part, row, key) for part in parts], axis) for key in parts[0].values[MODEL]}
        for row in rows
    }
    predicted, real = [part.predicted for part in parts], [part.real for part in parts]
    if along == "seeds":
        return replace(parts[0], values=joined, predicted=np.mean(predicted, axis=0), real=np.mean(real, axis=0))
    labels = tuple(label for part in parts for label in part.labels)
    effects = np.concatenate(predicted), np.concatenate(real)
    return replace(parts[0], labels=labels, values=joined, predicted=effects[0], real=effects[1])


def mean_log(counts: sp.csr_matrix) -> NDArray[np.float64]:
    """Mean of log(1 + counts per 10,000) over cells ``[G]``."""
    return np.asarray(log_cp10k(counts).mean(0, dtype=np.float64)).ravel()


def evaluate_perturbations(train: sp.csr_matrix, held_out: Sequence[HeldOut], *, seeds: int = 3) -> PerturbationScores:
    """Score predictions of held-out perturbations.

    Parameters
    ----------
    train
        Counts of training cells: the embedding of the E-distance is fitted on them.
    held_out
        Perturbations that were not trained on (or not in these cells).
    seeds
        Random halves, at least 2.

    Raises
    ------
    UserError
        If there is nothing to score, or a perturbation has fewer than 20 real cells.
    """
    short = [f"{one.label} ({one.real.shape[0]})" for one in held_out if one.real.shape[0] < 2 * MIN_CELLS]
    if not held_out or short or seeds < 2:
        raise UserError(
            f"Each held-out perturbation needs at least {2 * MIN_CELLS} real cells, and one and two seeds are needed;"
            f" too few: {', '.join(short) or 'perturbations or seeds'}."
        )
    space = fit_space(train)
    runs = [_one_seed(space, held_out, seed) for seed in range(seeds)]
    rows = runs[0].keys()
    values = {row: {metric.key: np.array([run[row][metric.key] for run in runs]) for metric in METRICS} for row in rows}
    bases = [mean_log(one.control) for one in held_out]
    predicted, real = (
        np.array([mean_log(cells) - base for cells, base in zip(of_all, bases, strict=True)])
        for of_all in ([one.predicted for one in held_out], [one.real for one in held_out])
    )
    return PerturbationScores(tuple(one.label for one in held_out), values, predicted, real)


@dataclass(frozen=True)
class _Drawn:
    """One perturbation at one seed: the half that is predicted, and what rows predict of it.

    Attributes
    ----------
    real
        Effect ``[G]`` of the half.
    top
        Genes with the clearest effects in the other half.
    effects
        Row to effect ``[G]``.
    points
        Coordinates ``[n, D]`` of the half's cells, "real", and of each row's.
    """

    real: F64
    top: NDArray[np.intp]
    effects: dict[str, F64]
    points: dict[str, NDArray[Any]]


def _one_seed(space: Space, held_out: Sequence[HeldOut], seed: int) -> dict[str, dict[str, list[float]]]:
    names = list(dict.fromkeys(name for one in held_out for name in one.baselines))
    drawn = [_draw(space, one, seed, number) for number, one in enumerate(held_out)]
    real = [one.real for one in drawn]
    size = float(np.mean([float(one.effects[CEILING] @ one.real) for one in drawn]))

    def evidence(row: str, own: int) -> PredictedEffect:
        one = drawn[own]
        return PredictedEffect(
            real=one.points["real"],
            other=one.points[row],
            effect=one.effects[row],
            real_effects=real,
            own=own,
            top=one.top,
            size=size,
            targets=held_out[own].targets,
        )

    return {
        row: {
            metric.key: [
                metric.compute(evidence(row, own)) if row in one.effects else np.nan for own, one in enumerate(drawn)
            ]
            for metric in METRICS
        }
        for row in (MODEL, CONTROL_COPY, *names, CEILING)
    }


def _draw(space: Space, one: HeldOut, seed: int, number: int) -> _Drawn:
    """Halve the real cells of the perturbation ``number`` and draw equally many cells for every row."""
    rng = np.random.default_rng([seed, number])
    order = rng.permutation(one.real.shape[0])
    first, second = one.real[order[: len(order) // 2]], one.real[order[len(order) // 2 :]]
    # The same halves for every perturbation: else a real effect would be furthest from its own other half, whose
    # controls are the rest of its own.
    shuffled = np.random.default_rng(seed).permutation(one.control.shape[0])
    halves = [shuffled, shuffled] if one.shared_controls else np.array_split(shuffled, 2)
    first_control, second_control = (one.control[half] for half in halves)
    real, other = mean_log(second) - mean_log(second_control), mean_log(first) - mean_log(first_control)
    pools = {"real": second, MODEL: one.predicted, CEILING: first, **one.populations}
    n = min(MAX_CELLS, *(cells.shape[0] for cells in pools.values()))
    some = {name: cells[rng.permutation(cells.shape[0])[:n]] for name, cells in pools.items()}
    # With replacement if there are few: what matters is that every row has as many cells.
    controls = one.control[rng.choice(one.control.shape[0], n, replace=one.control.shape[0] < n)]
    effects = {MODEL: mean_log(one.predicted) - mean_log(one.control), CEILING: other}
    effects |= {CONTROL_COPY: np.zeros_like(real), **one.baselines}
    points: dict[str, NDArray[Any]] = {name: space.project(cells) for name, cells in some.items()}
    at_control = space.project(controls)
    points |= {row: at_control + effects[row] @ space.components.T for row in effects if row not in points}
    return _Drawn(real, _clearest(first, first_control), effects, points)


def _clearest(perturbed: sp.csr_matrix, control: sp.csr_matrix) -> NDArray[np.intp]:
    """Return the genes with the largest absolute Welch t between real perturbed and control cells."""
    means, errors = [], []
    for cells in (perturbed, control):
        logs = log_cp10k(cells)
        mean = np.asarray(logs.mean(0, dtype=np.float64)).ravel()
        means.append(mean)
        errors.append((np.asarray(logs.multiply(logs).mean(0)).ravel() - mean**2) / cells.shape[0])
    t = np.abs(means[0] - means[1]) / np.sqrt(np.maximum(errors[0] + errors[1], 1e-12))
    return np.argsort(-t, kind="stable")[:TOP]


def _draws(n: int) -> NDArray[np.intp]:
    return np.random.default_rng(0).integers(n, size=(BOOTSTRAPS, n))


def _in_words(differences: NDArray[np.float64]) -> str:
    """Say what bootstrapped differences, of which positive is better, mean."""
    low, high = np.quantile(differences, [0.025, 0.975])
    return "better than" if low > 0 else "worse than" if high < 0 else "no better than"


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
