"""Verdicts on a figure, and the standard errors that they rest on.

Two statements are made of each figure, both of the *shortfall* s, the distance from the figure's best value:

    equivalent      s(model) - s(real cells) is below the margin of the metric
    better, worse   s(baseline) - s(model) is above, below zero

each where the one-sided bound at 97.5 % says so (t, as many degrees of freedom as there are splits). So a small test
set leads to "cannot tell", never to praise (two one-sided tests: Schuirmann, J. Pharmacokinet. Biopharm. 1987).

**Standard errors by half-samples.** Test, model, baseline and real cells are matched place by place. The n places are
split at random into two halves, and every figure is taken in both: half the difference of a statistic between the
halves, squared, estimates its variance at n places (the delete-half jackknife, Shao and Wu, Ann. Stat. 1989, by random
complementary halves, McCarthy, Rev. Int. Stat. Inst. 1969). No cell occurs twice, as it would in a bootstrap, which
nearest-neighbour figures do not survive; what depends on the number of cells, such as the bias of W2, is the same in
both halves. Where a statistic's noise falls faster than 1 / sqrt(n), as of MMD^2 and energy distance of equal
populations, the error is overstated by sqrt(2), which makes verdicts stricter. Where it does not fall, because single
cells decide the figure (:attr:`bgen.evaluate.metrics.metric.Metric.erratic`), the error of a half is taken for that of
the whole.

The error is that of one sample of n places. Several seeds make the figures steadier and the error better known; they
do not make it smaller, because they share test cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bgen.evaluate.metrics.metric import Metric, shortfall

Verdict = Literal["at the ceiling", "better than the baseline", "worse than the baseline", "cannot tell"]
ROWS = ("model", "baseline", "ceiling")
LEVEL = 0.025
"""Of each one-sided bound."""
SPLITS = 8
"""Random halvings of each seed."""


class Halved(Protocol):
    """Evidence of which the cells of some places can be taken."""

    def take(self, rows: NDArray[np.intp]) -> Self:
        """Return the evidence of these places."""
        ...


@dataclass(frozen=True)
class Errors:
    """Standard errors of three differences of shortfalls, from random halvings.

    Attributes
    ----------
    ceiling
        Of model - ceiling.
    baseline
        Of baseline - model.
    easy
        Of baseline - ceiling.
    splits
        Halvings, or fewer degrees of freedom where trainings differ.
    """

    ceiling: float
    baseline: float
    easy: float
    splits: int

    @property
    def t(self) -> float:
        """By how many standard errors a difference must clear its margin."""
        return float(stats.t.ppf(1 - LEVEL, self.splits))


def half_gaps(
    rows: Mapping[str, Any], metrics: Sequence[Metric[Any]], rng: np.random.Generator, n: int, splits: int = SPLITS
) -> NDArray[np.float64]:
    """Return half the difference of each shortfall between random halves of n places: ``[splits, rows, metrics]``.

    The square of a gap estimates the variance of a shortfall at n places, and that of the difference of two rows' gaps
    the variance of their difference.

    Parameters
    ----------
    rows
        Evidence (:class:`Halved`), n places each, matched place by place.
    """
    gaps = np.zeros((splits, len(rows), len(metrics)))
    for split in range(splits):
        order = rng.permutation(n)
        halves = order[: n // 2], order[n // 2 : 2 * (n // 2)]
        one, other = (
            [
                [shortfall(m.compute(evidence), m.better) for m in metrics]
                for evidence in (whole.take(np.sort(half)) for whole in rows.values())
            ]
            for half in halves
        )
        gaps[split] = (np.array(one) - np.array(other)) / 2
    gaps[:, :, [m.erratic for m in metrics]] *= np.sqrt(2)
    return gaps


def errors_of(gaps: NDArray[np.float64], trainings: NDArray[np.float64] | None = None) -> Errors:
    """Return the errors of one metric.

    Parameters
    ----------
    gaps
        Of model, baseline and ceiling ``[splits, 3]`` (:func:`half_gaps`), the splits of all seeds.
    trainings
        Their shortfalls ``[S, 3]`` in S trainings on the same cells, at least 2, where the verdict is on what such
        trainings make: the variance of their mean joins that of the cells. The degrees of freedom are Welch's
        and Satterthwaite's, rounded down, the fewest of the three.
    """
    squares = (_contrasts(gaps) ** 2).mean(axis=0)
    freedom = np.full(3, float(len(gaps)))
    if trainings is not None:
        number = len(trainings)
        between = _contrasts(trainings).var(axis=0, ddof=1) / number
        whole = squares + between
        with np.errstate(divide="ignore", invalid="ignore"):
            shared = whole**2 / (squares**2 / len(gaps) + between**2 / (number - 1))
        freedom, squares = np.where(whole > 0, shared, freedom), whole
    ceiling, baseline, easy = np.sqrt(squares)
    return Errors(float(ceiling), float(baseline), float(easy), max(1, int(freedom.min())))


def _contrasts(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return model - ceiling, baseline - model and baseline - ceiling of ``[..., 3]``."""
    model, baseline, ceiling = np.moveaxis(rows, -1, 0)
    return np.stack([model - ceiling, baseline - model, baseline - ceiling], axis=-1)


@dataclass(frozen=True)
class Judgement:
    """What can be said of a figure.

    Attributes
    ----------
    equivalent
        The model is as good as real cells, within the margin.
    differs
        The model is clearly worse than real cells, whatever the margin.
    easy
        The baseline is as good as real cells too, so the measure says little.
    better, worse
        The model is clearly better or worse than the baseline.
    """

    equivalent: bool
    differs: bool
    easy: bool
    better: bool
    worse: bool

    @property
    def verdict(self) -> Verdict:
        """In a few words."""
        if self.equivalent and not self.easy:
            return "at the ceiling"
        if self.better:
            return "better than the baseline"
        # A baseline that beats real cells, as with cells that are too typical of their label, is no reproach.
        return "worse than the baseline" if self.worse and self.differs else "cannot tell"


def judge(model: float, baseline: float, ceiling: float, errors: Errors, margin: float) -> Judgement:
    """Judge shortfalls (lower is better): see the head of this file."""
    t = errors.t
    equivalent = model - ceiling + t * errors.ceiling < margin
    return Judgement(
        equivalent=equivalent,
        differs=not equivalent and model - ceiling - t * errors.ceiling > 0,
        easy=baseline - ceiling + t * errors.easy < margin,
        better=baseline - model - t * errors.baseline > 0,
        worse=baseline - model + t * errors.baseline < 0,
    )


def judge_cells(model: NDArray[np.float64], baseline: NDArray[np.float64]) -> Verdict:
    """Judge losses of the same cells ``[N]`` (lower is better) without a ceiling, by their paired differences."""
    gained = baseline - model
    clear = float(stats.t.ppf(1 - LEVEL, len(gained) - 1) * gained.std(ddof=1) / np.sqrt(len(gained)))
    if gained.mean() > clear:
        return "better than the baseline"
    return "worse than the baseline" if gained.mean() < -clear else "cannot tell"
