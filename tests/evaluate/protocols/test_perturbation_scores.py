"""Means, intervals and verdicts over perturbations: how often they claim what is not so."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import skew
from scipy.stats import t as student

from bgen.evaluate.metrics.effects import METRICS
from bgen.evaluate.protocols.perturbation_scores import (
    CEILING,
    CONTROL_COPY,
    MODEL,
    Figures,
    PerturbationScores,
    join,
)

BY_KEY = {metric.key: metric for metric in METRICS}
PEARSON, EXPLAINED = BY_KEY["pearson"], BY_KEY["explained"]


def scores(
    values: dict[str, np.ndarray], names: list[str] | None = None, under: np.ndarray | None = None
) -> PerturbationScores:
    """Scores with one figure: a plain one, or, with ``under``, a ratio; values ``[U]``."""
    metric = PEARSON if under is None else EXPLAINED
    n = len(values[MODEL])
    chance = None if under is None else np.array([0, 1e-3, 1e-3])[:, None, None] * np.ones((1, n))
    figures = {
        row: {metric.key: Figures(over[None], None if under is None else under[None], chance)}
        for row, over in values.items()
    }
    labels = tuple(f"u{number}" for number in range(n))
    nothing = np.zeros((n, 3))
    return PerturbationScores(labels, tuple(names or labels), figures, nothing, nothing, "p", (metric,))


def claims(draw: object, names: list[str] | None, times: int) -> float:
    """Share of screens without a difference in which one is claimed."""
    claimed = 0
    for _ in range(times):
        found = scores(dict(zip((MODEL, CONTROL_COPY), draw(), strict=True)), names)  # type: ignore[operator]
        claimed += found.verdict(CONTROL_COPY, PEARSON) in ("better", "worse")
    return claimed / times


@pytest.mark.parametrize("n", [8, pytest.param(25, marks=pytest.mark.slow)])
def test_false_claims_are_as_rare_as_stated(n: int) -> None:
    """2,000 screens each; about .046 and .050."""
    rng = np.random.default_rng(n)
    assert claims(lambda: rng.normal(size=(2, n)), None, 2000) <= 0.062


def test_replicates_of_a_perturbation_are_one_observation() -> None:
    """25 targets in 3 replicates each, correlated by .3: counted as 75, they would claim too much."""
    rng = np.random.default_rng(0)
    names = [f"t{number}" for number in range(25) for _ in range(3)]

    def draw() -> np.ndarray:
        return np.sqrt(0.3) * np.repeat(rng.normal(size=(2, 25)), 3, 1) + np.sqrt(0.7) * rng.normal(size=(2, 75))

    assert claims(draw, names, 1000) <= 0.062
    assert claims(draw, None, 400) > 0.08


@pytest.mark.parametrize("n", [8, pytest.param(25, marks=pytest.mark.slow)])
def test_skewed_differences_claim_no_more(n: int) -> None:
    """Student's interval alone would claim .11 and .08."""
    rng = np.random.default_rng(1)
    assert claims(lambda: (rng.exponential(size=n) - 1, np.zeros(n)), None, 1500) <= 0.068


def test_products_of_skewed_values_claim_no_more() -> None:
    rng = np.random.default_rng(1)
    assert claims(lambda: (rng.exponential(size=12) ** 1.5, rng.exponential(size=12) ** 1.5), None, 1500) <= 0.06


def test_nothing_is_claimed_of_few_perturbations() -> None:
    """However clear; replicates do not make it more."""
    few = np.linspace(0.80, 0.82, 7)
    found = scores({MODEL: few, CONTROL_COPY: few - 0.5, "train mean": few - 0.6})
    assert found.verdict(CONTROL_COPY, PEARSON) == "too few perturbations to tell"
    assert found.sentences()[0] == "Against control copy: too few perturbations to tell (7; 8 are needed)."
    assert not any("comparisons" in sentence for sentence in found.sentences())
    replicates = scores({MODEL: np.repeat(few, 3), CONTROL_COPY: np.repeat(few - 0.5, 3)}, list("abcdefg" * 3))
    assert replicates.verdict(CONTROL_COPY, PEARSON) == "too few perturbations to tell"
    enough = np.linspace(0.80, 0.82, 8)
    found = scores({MODEL: enough, CONTROL_COPY: enough - 0.5})
    assert found.verdict(CONTROL_COPY, PEARSON) == "better"
    assert found.sentences() == [
        "Against control copy: better in Pearson delta.",
        "1 comparison at 5 % each: about 0 of them would come out better or worse if nothing differed.",
    ]


def test_the_interval_is_students_over_perturbations() -> None:
    values = np.array([0.1, 0.2, 0.4, 0.65])
    found = scores({MODEL: values}, ["a", "a", "b", "c"])
    means = np.array([0.15, 0.4, 0.65])
    assert found.mean(MODEL, "pearson") == pytest.approx(means.mean())
    away = 4.302653 * means.std(ddof=1) / np.sqrt(3)
    assert found.interval(MODEL, "pearson") == pytest.approx((means.mean() - away, means.mean() + away))
    one = scores({MODEL: values}, ["a"] * 4)
    assert np.isnan(one.interval(MODEL, "pearson")).all()
    assert one.as_json()["rows"][MODEL]["pearson"]["interval"] == [None, None]


def test_of_skewed_values_the_wider_side_of_halls_interval_counts() -> None:
    """Reckoned by inverting his transformation numerically."""
    values = np.array([0.0, 0.1, 0.1, 0.2, 0.3, 0.3, 0.5, 2.0])
    low, high = scores({MODEL: values}).interval(MODEL, "pearson")
    n, error = 8, values.std(ddof=1) / np.sqrt(8)
    a = skew(values, bias=False) / np.sqrt(n)
    reach = student.ppf(0.975, n - 1)
    t = np.linspace(-60, 60, 2_000_001)
    g = t + a * t**2 / 3 + a**2 * t**3 / 27 + a / 6
    lowest, highest = t[np.searchsorted(g, -reach)], t[np.searchsorted(g, reach)]
    assert low == pytest.approx(values.mean() - max(reach, highest) * error, abs=1e-3)
    assert high == pytest.approx(values.mean() - min(-reach, lowest) * error, abs=1e-3)
    assert high - values.mean() > 1.5 * (values.mean() - low)


def test_a_ratio_is_that_of_sums_and_within_its_interval() -> None:
    rng = np.random.default_rng(2)
    under = rng.uniform(1, 3, 30)
    found = scores({MODEL: 0.4 * under + rng.normal(0, 0.1, 30), CONTROL_COPY: np.zeros(30)}, None, under)
    low, high = found.interval(MODEL, "explained")
    assert low < found.mean(MODEL, "explained") < high
    assert high - low < 0.1
    assert found.mean(MODEL, "explained") == pytest.approx(found.figures[MODEL]["explained"].over.sum() / under.sum())
    assert np.mean(found.by_unit(MODEL, "explained")) == pytest.approx(found.mean(MODEL, "explained"))
    assert found.verdict(CONTROL_COPY, EXPLAINED) == "better"
    nothing = scores({MODEL: rng.normal(0, 1e-3, 30), CONTROL_COPY: np.zeros(30)}, None, rng.normal(0, 1e-3, 30))
    assert not nothing.has(MODEL, "explained")
    assert nothing.verdict(CONTROL_COPY, EXPLAINED) is None
    assert nothing.headline() == (
        "No effect to measure: the cells of 30 held-out perturbations differ from control cells by no more than noise."
    )


def test_how_often_noise_counts_as_an_effect() -> None:
    """Sums of pure noise with the stated error, some of it shared by all perturbations."""
    rng = np.random.default_rng(3)
    chance = np.array([0.3, 1.0, 0.5])[:, None, None] * np.ones((1, 20))
    nothing = np.zeros((1, 20))
    noise = 0.3 + rng.normal(size=(2000, 1, 20)) + 0.5 * rng.normal(size=(2000, 1, 1))
    assert np.mean([Figures(nothing, under, chance).is_clear() for under in noise]) < 0.005
    assert Figures(nothing, np.full((1, 20), 3.0), chance).is_clear()


def test_the_headline_names_the_best_baseline() -> None:
    rng = np.random.default_rng(4)
    under = np.full(12, 2.0)
    rows = {MODEL: 1.2, CONTROL_COPY: 0.0, "train mean": 0.4, "additive": 0.8}
    found = scores({row: share + rng.normal(0, 0.01, 12) for row, share in rows.items()}, None, under)
    assert found.headline() == (
        "The model explains 60 % of the effects of 12 held-out perturbations; the best baseline (additive) explains"
        " 40 %, and the model is better than it."
    )
    worse = scores({row: share + rng.normal(0, 0.01, 12) for row, share in (rows | {MODEL: -1.0}).items()}, None, under)
    assert worse.headline().startswith(
        "The model explains nothing of the effects of 12 held-out perturbations (predicting no"
    )
    assert worse.headline().endswith("and the model is worse than it.")
    few = scores({row: np.full(3, share) for row, share in rows.items()}, None, under[:3])
    assert few.headline().endswith(
        "(additive) explains 40 %: too few perturbations to tell which is better (8 are needed)."
    )
    alone = scores({MODEL: 1.2 + rng.normal(0, 0.01, 12), CONTROL_COPY: np.zeros(12)}, None, under)
    assert alone.headline().endswith(
        "no baseline explains more than no effect does, and the model is better than that."
    )


def test_scores_of_several_trainings_are_joined() -> None:
    rng = np.random.default_rng(5)
    first = scores({MODEL: rng.random(4), CONTROL_COPY: np.zeros(4), CEILING: np.ones(4)})
    second = scores({MODEL: rng.random(2), CONTROL_COPY: np.zeros(2), "additive": np.ones(2), CEILING: np.ones(2)})
    both = join([first, second], "perturbations")
    assert list(both.figures) == [MODEL, CONTROL_COPY, "additive", CEILING]
    assert both.labels == first.labels + second.labels
    assert both.n_perturbations == 4  # those of the second have names of the first
    assert both.figures["additive"]["pearson"].known.tolist() == [False] * 4 + [True] * 2
    assert both.mean("additive", "pearson") == 1
    again = join([first, first], "seeds")
    assert again.interval(MODEL, "pearson") == pytest.approx(first.interval(MODEL, "pearson"))
    assert again.figures[MODEL]["pearson"].over.shape == (2, 4)
    assert again.as_json()["rows"][MODEL]["pearson"]["by_seed"] == pytest.approx([first.mean(MODEL, "pearson")] * 2)
