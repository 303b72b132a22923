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
        Halvings.
    """

    ceiling: float
    baseline: float
    easy: float
    splits: int

    @property
    def t(self) -> float:
        """By how many standard errors a difference must clear its margin."""
        return float(stats.t.ppf(1 - LEVEL, self.splits))


def half_squares(
    rows: Mapping[str, Any], metrics: Sequence[Metric[Any]], rng: np.random.Generator, n: int, splits: int = SPLITS
) -> NDArray[np.float64]:
    """Return the squared halves of differences between halves: ``[splits, metrics, 3]``, in the order of
    :class:`Errors`.

    Parameters
    ----------
    rows
        Evidence (:class:`Halved`) of model, baseline and ceiling, n places each.
    """
    found = np.zeros((splits, len(metrics), 3))
    for split in range(splits):
        order = rng.permutation(n)
        halves = order[: n // 2], order[n // 2 : 2 * (n // 2)]
        differences = []
        for half in halves:
            taken = [rows[row].take(np.sort(half)) for row in ROWS]
            s = np.array([[shortfall(m.compute(evidence), m.better) for m in metrics] for evidence in taken])
            differences.append(np.stack([s[0] - s[2], s[1] - s[0], s[1] - s[2]], axis=-1))
        found[split] = ((differences[0] - differences[1]) / 2) ** 2
    found[:, [m.erratic for m in metrics]] *= 2
    return found


def errors_of(squares: NDArray[np.float64]) -> Errors:
    """Return the errors of one metric from ``[splits, 3]``, the splits of all seeds."""
    ceiling, baseline, easy = np.sqrt(squares.mean(axis=0))
    return Errors(float(ceiling), float(baseline), float(easy), len(squares))


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
