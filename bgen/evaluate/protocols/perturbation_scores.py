"""Scores of predicted perturbations: means, intervals, verdicts and sentences.

What is resampled in thought is the **perturbation**: its replicates, strata and doses are one observation, because what
makes one hard to predict is the same in all of them. A mean is that over perturbations of their means. Its interval is
the wider on each side of Student's, with one degree of freedom less than there are perturbations, and of Hall's, which
allows for skewness (J. R. Stat. Soc. B 1992): a percentile bootstrap over few perturbations is too short, and
differences are skewed, since a few strong perturbations weigh most. A ratio of sums has the interval of its linear
approximation. A verdict is such an interval of the paired difference between model and baseline, and there is none
below :data:`LEAST_PERTURBATIONS`. Simulated claims without a difference, of a nominal 5 %, for 8 to 60 perturbations:
4 to 5 % for normal differences, 4 to 5 % for exponential ones, 5 to 8 % for log-normal ones.

A ratio is given where what is below the line is clearly not noise, and is NaN elsewhere: where nothing happens, there
is no effect of which a share could be explained.

What intervals do not know: all effects are measured from the same control cells, so they share that noise.

Axes: S seeds, U units (perturbations, each maybe in several replicates or at several doses), C perturbations, G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from scipy.stats import t as student

from bgen.arrays import F64
from bgen.evaluate.metrics.effects import RatioMetric
from bgen.evaluate.metrics.metric import Metric
from bgen.notebooks import as_html

CONTROL_COPY, MODEL, CEILING, DUPLICATE = "control copy", "model", "ceiling", "duplicate"
LEAST_PERTURBATIONS = 8
"""Perturbations below which nothing is claimed."""

LEVEL = 0.05
CLEAR = 3.0
"""Standard errors above which what is below the line of a ratio is not noise."""

MAIN = "explained"
"""The figure of the headline."""

Verdict = Literal["better", "worse", "no clear difference", "too few perturbations to tell"]
BETTER: Verdict = "better"
WORSE: Verdict = "worse"
UNCLEAR: Verdict = "no clear difference"
TOO_FEW: Verdict = "too few perturbations to tell"
_ORDER: tuple[Verdict, ...] = (BETTER, WORSE, UNCLEAR)


@dataclass(frozen=True)
class Figures:
    """One figure of one row: ``over [S, U]``, NaN where it is not defined.

    For ratios also ``under [S, U]``, and ``chance [3, S, U]``, what ``under`` would be if there were no effect: its
    expected value, its own standard error, and that which units share.
    """

    over: F64
    under: F64 | None = None
    chance: F64 | None = None

    def of(self, units: NDArray[np.bool_]) -> Figures:
        """Return those of some units."""
        parts = [None if part is None else part[..., units] for part in (self.under, self.chance)]
        return Figures(self.over[..., units], *parts)

    def without(self) -> Figures:
        """Return the same, not defined."""
        return replace(self, over=np.full_like(self.over, np.nan))

    def of_seed(self, seed: int) -> Figures:
        """Return those of one seed."""
        some = slice(seed, seed + 1)
        under = None if self.under is None else self.under[some]
        return Figures(self.over[some], under, None if self.chance is None else self.chance[:, some])

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which units have the figure at any seed ``[U]``."""
        return np.asarray(np.isfinite(self.over).any(0))

    def by_unit(self) -> tuple[F64, F64]:
        """Return means over seeds of both sides ``[U]``; under is 1 where the figure is no ratio."""
        over: F64 = np.nanmean(self.over, 0)
        under: F64 = np.ones_like(over) if self.under is None else self.under.mean(0)
        return over, under

    def is_clear(self) -> bool:
        """Whether the sum below the line is not noise."""
        if self.under is None or self.chance is None:
            return True
        expected, own, shared = self.chance.mean(1)
        total = float(self.under.mean(0).sum() - expected.sum())
        return total > 1e-12 and total > CLEAR * float(np.sqrt((own**2).sum() + shared.sum() ** 2))


@dataclass(frozen=True)
class PerturbationScores:
    """What was found.

    Attributes
    ----------
    labels
        Of the U units.
    names
        Perturbation of each.
    figures
        Row (model, baselines, duplicate, ceiling) to metric to figures.
    predicted, real
        Effects ``[U, G]``, the real ones of all held-out cells; NaN at genes that were perturbed themselves.
    """

    labels: tuple[str, ...]
    names: tuple[str, ...]
    figures: dict[str, dict[str, Figures]]
    predicted: F64
    real: F64
    protocol: str
    metrics: tuple[Metric[Any], ...]

    @property
    def n_perturbations(self) -> int:
        """C."""
        return len(set(self.names))

    @property
    def baselines(self) -> list[str]:
        """Rows that the model is compared with."""
        return [row for row in self.figures if row not in (MODEL, DUPLICATE, CEILING)]

    def has(self, row: str, key: str) -> bool:
        """Whether a row has a figure."""
        return bool(np.isfinite(self.mean(row, key)))

    def mean(self, row: str, key: str) -> float:
        """Mean over perturbations and seeds; a ratio of such means; NaN where it is not defined."""
        return self._estimate(self.figures[row][key])[0]

    def interval(self, row: str, key: str) -> tuple[float, float]:
        """95 % interval over perturbations; NaN for one perturbation, and where the figure is not defined."""
        estimate, off = self._estimate(self.figures[row][key])
        return _interval(estimate, off)

    def by_unit(self, row: str, key: str) -> F64:
        """Return the figure of each unit ``[U]``; of a ratio, such that their mean is the ratio where C = U."""
        figures = self.figures[row][key]
        values = np.full(len(self.labels), np.nan)
        known = figures.known
        if self.has(row, key):
            over, under = figures.of(known).by_unit()
            values[known] = over / self._per_perturbation(under, known).mean()
        return values

    def verdict(self, baseline: str, metric: Metric[Any]) -> Verdict | None:
        """Compare the model with a baseline: None where either has no such figure, or none is better than another."""
        mine, theirs = self.figures[MODEL][metric.key], self.figures[baseline][metric.key]
        both = mine.known & theirs.known
        if metric.better == "one" or not (
            self.has(MODEL, metric.key) and self.has(baseline, metric.key) and both.any()
        ):
            return None
        (ours, off), (other, other_off) = (self._estimate(figures.of(both), both) for figures in (mine, theirs))
        if len(off) < LEAST_PERTURBATIONS:
            return TOO_FEW
        if len(off) != len(other_off):  # among these the figure is noise in one of them
            return None
        low, high = _interval(ours - other, off - other_off)
        if metric.better == "lower":
            low, high = -high, -low
        return BETTER if low > 0 else WORSE if high < 0 else UNCLEAR

    def _per_perturbation(self, values: F64, units: NDArray[np.bool_]) -> F64:
        """Return means ``[C]`` of values of some units."""
        number = self._number[units]
        sizes = np.bincount(number)
        means: F64 = np.bincount(number, values)[sizes > 0] / sizes[sizes > 0]
        return means

    @cached_property
    def _number(self) -> NDArray[np.intp]:
        """Number of the perturbation of each unit ``[U]``."""
        return np.unique(self.names, return_inverse=True)[1]

    def _estimate(self, figures: Figures, units: NDArray[np.bool_] | None = None) -> tuple[float, F64]:
        """Return an estimate, and how far off each perturbation is ``[C]``: the estimate is as noisy as their mean.

        ``units``: those of ``figures``, if not all.
        """
        there = np.ones(len(self.labels), bool) if units is None else units.copy()
        known = figures.known
        there[there] = known
        if not known.any() or not figures.of(known).is_clear():
            return float("nan"), np.zeros(0)
        over, under = (self._per_perturbation(part, there) for part in figures.of(known).by_unit())
        estimate = float(over.sum() / under.sum())
        return estimate, (over - estimate * under) / under.mean()

    def sentences(self) -> list[str]:
        """Say in plain words where the model stands against each baseline, and how large its effects are."""
        said, compared = [], 0
        for row in self.baselines:
            by_verdict: dict[str, list[str]] = {}
            for metric in self.metrics:
                found = self.verdict(row, metric)
                if found is not None:
                    by_verdict.setdefault(found, []).append(metric.title)
            compared += sum(len(titles) for verdict, titles in by_verdict.items() if verdict != TOO_FEW)
            if TOO_FEW in by_verdict:
                said.append(f"Against {row}: {TOO_FEW} ({self.n_perturbations}; {LEAST_PERTURBATIONS} are needed).")
            elif by_verdict:
                parts = (f"{name} in {', '.join(by_verdict[name])}" for name in _ORDER if name in by_verdict)
                said.append(f"Against {row}: {'; '.join(parts)}.")
        said += self._of_size()
        if compared:
            said.append(
                f"{compared} comparison{'s' if compared > 1 else ''} at {_percent(LEVEL)} each: about"
                f" {LEVEL * compared:.0f} of them would come out better or worse if nothing differed."
            )
        return said

    def _of_size(self) -> list[str]:
        """Say whether predicted effects have the size that they should have."""
        if "calibration" not in self.figures[MODEL]:
            return []
        if not self._has_effects():
            return ["No effect to measure: the real cells differ from control cells by no more than noise."]
        if not self.has(MODEL, "calibration"):
            return ["Calibration: the model predicts no effect that is more than noise."]
        factor, (low, high) = self.mean(MODEL, "calibration"), self.interval(MODEL, "calibration")
        if self.n_perturbations < LEAST_PERTURBATIONS:
            return [f"Calibration: {factor:.2f}; {TOO_FEW} whether predicted effects are too large or too small."]
        size = "too large" if high < 1 else "too small" if low > 1 else "not shown to be too large or too small"
        return [f"Calibration: {factor:.2f} ({low:.2f} to {high:.2f}): predicted effects are {size}."]

    def _has_effects(self) -> bool:
        return any(self.has(row, MAIN) for row in self.figures if MAIN in self.figures[row])

    def headline(self) -> str:
        """Say the result in one sentence."""
        n = self.n_perturbations
        held_out = f"{n} held-out perturbation{'s' if n > 1 else ''}"
        if n < len(self.labels):
            held_out += f" ({len(self.labels)} with their replicates and doses)"
        main = next((metric for metric in self.metrics if metric.key == MAIN), None)
        if main is None:
            first = self.metrics[0]
            return f"{first.title} of the model over {held_out}: {self.mean(MODEL, first.key):.{first.digits}f}."
        if not self._has_effects():
            return f"No effect to measure: the cells of {held_out} differ from control cells by no more than noise."
        share = self.mean(MODEL, MAIN)
        said = (
            f"The model explains {_percent(share)} of the effects of {held_out}"
            if share > 0
            else f"The model explains nothing of the effects of {held_out} (predicting no effect is nearer)"
        )
        others = {row: self.mean(row, MAIN) for row in self.baselines if row != CONTROL_COPY and self.has(row, MAIN)}
        best = max(others, key=lambda row: others[row], default=None)
        if best is None or others[best] <= 0:
            best, what = CONTROL_COPY, "no baseline explains more than no effect does"
        else:
            what = f"the best baseline ({best}) explains {_percent(others[best])}"
        verdict = self.verdict(best, main)
        if verdict is None or verdict == TOO_FEW:
            return f"{said}; {what}: {TOO_FEW} which is better ({LEAST_PERTURBATIONS} are needed)."
        than = "that" if best == CONTROL_COPY else "it"
        told = {
            BETTER: f"is better than {than}",
            WORSE: f"is worse than {than}",
            UNCLEAR: f"cannot be told from {than}",
        }
        return f"{said}; {what}, and the model {told[verdict]}."

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        rows = {
            row: {
                metric.key: {
                    "mean": _number(self.mean(row, metric.key)),
                    "interval": [_number(v) for v in self.interval(row, metric.key)],
                    "by_seed": [_number(v) for v in self._by_seed(row, metric.key)],
                    "by_perturbation": [_number(v) for v in self.by_unit(row, metric.key)],
                }
                for metric in self.metrics
                if self.has(row, metric.key)
            }
            for row in self.figures
        }
        return {
            "protocol": self.protocol,
            "headline": self.headline(),
            "perturbations": list(self.labels),
            "rows": rows,
            "words": self.sentences(),
        }

    def _by_seed(self, row: str, key: str) -> list[float]:
        figures = self.figures[row][key]
        return [self._estimate(figures.of_seed(seed))[0] for seed in range(len(figures.over))]

    def _repr_html_(self) -> str:
        return as_html(self.headline(), self.table())

    def table(self) -> Table:
        """Return a table: a line per figure, a column per row."""
        seeds = len(self.figures[MODEL][self.metrics[0].key].over)
        table = Table(
            title=f"Scores ({self.protocol})",
            caption=f"Means over {self.n_perturbations} held-out perturbations and {seeds} seeds, with 95 % intervals"
            " over perturbations.",
            box=None,
            pad_edge=False,
        )
        table.add_column("")
        for row in self.figures:
            table.add_column(row, justify="right")
        for metric in self.metrics:
            table.add_row(metric.title, *(self.cell(row, metric) for row in self.figures))
        return table

    def cell(self, row: str, metric: Metric[Any], between: str = "\n") -> str:
        """Return a figure with its interval as text."""
        if not self.has(row, metric.key):
            return "-"
        low, high = self.interval(row, metric.key)
        digits = metric.digits
        mean = f"{self.mean(row, metric.key):.{digits}f}"
        return f"{mean}{between}{low:.{digits}f}..{high:.{digits}f}" if np.isfinite(low) else mean


def join(parts: Sequence[PerturbationScores], along: Literal["seeds", "perturbations"]) -> PerturbationScores:
    """Join scores: of the same perturbations from several trainings, or of several perturbations.

    A row that a part does not have is NaN there.
    """
    last = [DUPLICATE, CEILING]
    rows = list(dict.fromkeys(row for part in parts for row in part.figures))
    rows = [row for row in rows if row not in last] + [row for row in last if row in rows]

    def of(part: PerturbationScores, row: str, key: str) -> Figures:
        if row in part.figures:
            return part.figures[row][key]
        like = part.figures[MODEL][key]
        nothing = [None if some is None else np.full_like(some, np.nan) for some in (like.under, like.chance)]
        return Figures(np.full_like(like.over, np.nan), *nothing)

    axis = -2 if along == "seeds" else -1

    def joined(some: Sequence[F64 | None]) -> F64 | None:
        there = [part for part in some if part is not None]
        return np.concatenate(there, axis) if there else None

    figures: dict[str, dict[str, Figures]] = {}
    for row in rows:
        figures[row] = {}
        for metric in parts[0].metrics:
            found = [of(part, row, metric.key) for part in parts]
            over = np.concatenate([one.over for one in found], axis)
            figures[row][metric.key] = Figures(
                over, joined([one.under for one in found]), joined([one.chance for one in found])
            )
    predicted, real = [part.predicted for part in parts], [part.real for part in parts]
    if along == "seeds":
        return replace(parts[0], figures=figures, predicted=np.mean(predicted, axis=0), real=np.mean(real, axis=0))
    return replace(
        parts[0],
        labels=tuple(label for part in parts for label in part.labels),
        names=tuple(name for part in parts for name in part.names),
        figures=figures,
        predicted=np.concatenate(predicted),
        real=np.concatenate(real),
    )


def measured(metric: Metric[Any], evidence: Sequence[Sequence[Any]]) -> Figures:
    """Return a metric's figures from evidence of S seeds and U units; None where a unit has none."""

    def values(compute: Any) -> F64:
        return np.array([[np.nan if one is None else compute(one) for one in of_seed] for of_seed in evidence])

    if not isinstance(metric, RatioMetric):
        return Figures(values(metric.compute))
    chance = np.stack([values(lambda e, at=at: metric.chance(e)[at]) for at in range(3)])
    return Figures(values(metric.compute), values(metric.under), chance)


def _interval(estimate: float, off: F64) -> tuple[float, float]:
    """Return the interval of an estimate from the deviations ``[C]`` of perturbations, of mean 0; NaN for one of them.

    Hall's transformation makes the statistic t of skewed values symmetric: g(t) = t + a t^2 / 3 + a^2 t^3 / 27 + a / 6,
    with the skewness divided by sqrt(C) as a.
    """
    n = len(off)
    if n < 2:
        return float("nan"), float("nan")
    error = float(np.sqrt((off**2).sum() / (n - 1) / n))
    reach = float(student.ppf(1 - LEVEL / 2, n - 1))
    ends = [-reach, reach]
    spread = float(np.sqrt((off**2).mean()))
    a = float((off**3).mean()) / spread**3 * np.sqrt(n - 1) / (n - 2) if n > 2 and spread > 1e-12 else 0.0
    if abs(a) > 1e-6:
        halls = [3 / a * (float(np.cbrt(1 + a * (end - a / 6))) - 1) for end in ends]
        ends = [min(ends[0], halls[0]), max(ends[1], halls[1])]
    return estimate - ends[1] * error, estimate - ends[0] * error


def _percent(share: float) -> str:
    return f"{100 * min(share, 1):.0f} %"  # a share that is freed of noise may come out above all


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
