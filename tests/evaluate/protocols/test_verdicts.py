"""Verdicts err in at most one comparison in twenty, and more draws make them stricter, never looser."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse

from bgen.evaluate.metrics.counts import CountedPopulations
from bgen.evaluate.metrics.distribution import Points
from bgen.evaluate.metrics.metric import Metric, shortfall
from bgen.evaluate.metrics.registry import choose_metrics
from bgen.evaluate.protocols.verdicts import ROWS, Errors, errors_of, half_gaps, judge, judge_cells

N = 60
QUICKEST = choose_metrics("energy", "library_ks")
QUICK = choose_metrics("energy", "nn_accuracy", "precision", "library_ks")
CHEAP = (*QUICK, *choose_metrics("w2", "mmd2", "recall", "mean_rmse"))
LEARNED = choose_metrics("classifier", "boosting")
GENES = 12
RATES = np.random.default_rng(0).gamma(2.0, 3.0, GENES)


def cells(rng: np.random.Generator, n: int, off: float) -> tuple[NDArray[Any], sparse.csr_matrix]:
    """Cells with a latent state, and how far their genes' means are off: coordinates and counts."""
    state = rng.lognormal(0, 0.3, (n, 1)) * np.exp(off * np.linspace(-1, 1, GENES))
    counts = rng.poisson(rng.gamma(3.0, 1 / 3.0, (n, GENES)) * RATES * state)
    return np.log1p(counts.astype(float)), sparse.csr_matrix(counts.astype(np.float32))


def compared(rng: np.random.Generator, off: dict[str, float], n: int = N) -> dict[str, CountedPopulations]:
    real, real_counts = cells(rng, n, 0.0)
    rows = {}
    for row in ROWS:
        other, counts = cells(rng, n, off[row])
        genes = np.arange(GENES)
        rows[row] = CountedPopulations(real, other, 3.0, real_counts, counts, genes, genes)
    return rows


def shortfalls(rows: dict[str, CountedPopulations], metrics: tuple[Metric[Any], ...]) -> NDArray[np.float64]:
    """``[rows, metrics]``."""
    return np.array([[shortfall(m.compute(rows[row]), m.better) for m in metrics] for row in ROWS])


def share_of_errors(metrics: tuple[Metric[Any], ...], times: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the shares of false "at the ceiling" and of false "better", by metric.

    The model is off, and the margin of each metric is just what that makes of it on average; the baseline is of the
    model's own distribution.
    """
    off = {"model": 0.25, "baseline": 0.25, "ceiling": 0.0}
    rng = np.random.default_rng(1)
    gaps = [(s[0] - s[2]) for s in (shortfalls(compared(rng, off), metrics) for _ in range(400))]
    margins = np.mean(gaps, axis=0)
    ceiling, better = np.zeros(len(metrics)), np.zeros(len(metrics))
    for _ in range(times):
        rows = compared(rng, off)
        s = shortfalls(rows, metrics)
        gaps = half_gaps(rows, metrics, rng, N)
        for place in range(len(metrics)):
            told = judge(*s[:, place], errors_of(gaps[:, :, place]), margins[place])
            ceiling[place] += told.equivalent
            better[place] += told.better
    keys = [m.key for m in metrics]
    return dict(zip(keys, ceiling / times, strict=True)), dict(zip(keys, better / times, strict=True))


def at_most(times: int) -> float:
    """Five per cent, and what chance adds at a count of a true level of five per cent (one in a thousand tests)."""
    return 0.05 + 3.1 * float(np.sqrt(0.05 * 0.95 / times))


@pytest.mark.parametrize("metrics", [QUICKEST, pytest.param(QUICK, marks=pytest.mark.slow)], ids=["two", "four"])
def test_false_verdicts_are_few(metrics: tuple[Metric[Any], ...]) -> None:
    for shares in share_of_errors(metrics, 150):
        assert max(shares.values()) <= at_most(150), shares


@pytest.mark.slow
def test_false_verdicts_are_few_in_a_thousand_comparisons() -> None:
    for shares in share_of_errors(CHEAP, 1000):
        assert max(shares.values()) <= 0.05, shares


@pytest.mark.slow
def test_false_verdicts_of_classifiers_are_few() -> None:
    for shares in share_of_errors(LEARNED, 300):
        assert max(shares.values()) <= at_most(300), shares


def test_equal_populations_have_no_false_better_where_noise_is_degenerate() -> None:
    """MMD^2 and energy distance of equal populations: their noise is of second order."""
    metrics = choose_metrics("mmd2", "energy")
    rng = np.random.default_rng(2)
    better = np.zeros(2)
    for _ in range(200):
        rows = compared(rng, dict.fromkeys(ROWS, 0.0))
        s = shortfalls(rows, metrics)
        gaps = half_gaps(rows, metrics, rng, N, splits=4)
        better += [judge(*s[:, place], errors_of(gaps[:, :, place]), 0.0).better for place in range(2)]
    assert max(better / 200) <= 0.05


def test_half_samples_give_the_standard_error() -> None:
    """Of a mean it is known: sd / sqrt(n), of both populations."""
    metric = Metric[Any]("mean", "mean", "lower", 3, "Mean.", lambda p: float(p.other.mean()))
    rng = np.random.default_rng(3)
    found = []
    for _ in range(100):
        rows = {row: Points(np.zeros((N, 1)), rng.normal(size=(N, 1))) for row in ROWS}
        found.append(errors_of(half_gaps(rows, (metric,), rng, N, splits=4)[:, :, 0]).ceiling ** 2)
    assert np.sqrt(np.mean(found)) == pytest.approx(np.sqrt(2 / N), rel=0.1)


def test_trainings_that_differ_add_their_error() -> None:
    """Errors of cells and of trainings, both known; nobody is surer for having trained again."""
    rng = np.random.default_rng(5)
    gaps = rng.normal(scale=0.3, size=(400, 3))
    alone = errors_of(gaps)
    assert alone.ceiling == pytest.approx(0.3 * np.sqrt(2), rel=0.1)
    same = errors_of(gaps, np.tile([1.0, 2.0, 0.5], (3, 1)))
    assert (same.ceiling, same.splits) == (alone.ceiling, alone.splits)
    trainings = np.stack([rng.normal(scale=0.5, size=400), *np.zeros((2, 400))], axis=1)
    many = errors_of(gaps, trainings)
    assert many.ceiling == pytest.approx(np.sqrt(0.18 + 0.25 / 400), rel=0.1)
    assert many.easy == pytest.approx(alone.easy)
    few = errors_of(np.zeros((8, 3)), trainings[:3])
    assert few.splits == 2
    assert few.ceiling == pytest.approx(trainings[:3, 0].std(ddof=1) / np.sqrt(3))


def test_more_draws_make_a_verdict_no_looser() -> None:
    """The error of a figure is that of its cells, however often they are drawn."""
    rng = np.random.default_rng(4)
    rows = compared(rng, {"model": 0.3, "baseline": 0.5, "ceiling": 0.0})
    metrics = choose_metrics("energy")
    few, many = (errors_of(half_gaps(rows, metrics, rng, N, splits=splits)[:, :, 0]) for splits in (16, 100))
    assert many.ceiling == pytest.approx(few.ceiling, rel=0.5)
    assert many.ceiling > 0
    assert many.t < few.t < 2.2


@pytest.mark.parametrize(
    ("model", "baseline", "ceiling", "error", "margin", "verdict"),
    [
        (5.0, 8.0, 5.0, 0.1, 0.5, "at the ceiling"),
        (4.0, 8.0, 5.0, 0.1, 0.5, "at the ceiling"),
        (5.6, 8.0, 5.0, 0.1, 0.5, "better than the baseline"),
        (7.9, 8.0, 5.0, 0.1, 0.5, "cannot tell"),
        (9.0, 8.0, 5.0, 0.1, 0.5, "worse than the baseline"),
        (5.0, 5.0, 5.0, 0.1, 0.5, "cannot tell"),  # the baseline is as good: nothing is told
        (5.1, 4.8, 5.0, 0.1, 0.5, "cannot tell"),  # as good as real cells, so no reproach either
        (5.0, 8.0, 5.0, 2.0, 0.5, "cannot tell"),  # too noisy for any word
    ],
)
def test_words(model: float, baseline: float, ceiling: float, error: float, margin: float, verdict: str) -> None:
    told = judge(model, baseline, ceiling, Errors(error, error, error, 24), margin)
    assert told.verdict == verdict


def test_noise_never_brings_a_model_to_the_ceiling() -> None:
    verdicts = [judge(5.4, 8.0, 5.0, Errors(e, e, e, 24), 0.5).equivalent for e in (0.01, 0.04, 0.1, 1.0, 10.0)]
    assert verdicts == sorted(verdicts, reverse=True)
    assert verdicts[0]
    assert not verdicts[-1]


def test_losses_of_the_same_cells_are_judged_by_their_differences() -> None:
    rng = np.random.default_rng(6)
    hard = rng.gamma(2.0, 100.0, 400)  # cells differ far more than methods
    assert judge_cells(hard - 1 + rng.normal(size=400), hard) == "better than the baseline"
    assert judge_cells(hard + 1 + rng.normal(size=400), hard) == "worse than the baseline"
    claimed = [judge_cells(hard + rng.normal(size=400), hard) != "cannot tell" for _ in range(400)]
    assert np.mean(claimed) <= at_most(400)
