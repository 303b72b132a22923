"""The protocol for perturbations: real cells reach the ceiling, and every figure falls where it must."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from bgen.errors import UserError
from bgen.evaluate.protocols.perturbation import (
    CEILING,
    CONTROL_COPY,
    METRICS,
    MODEL,
    HeldOut,
    PerturbationScores,
    evaluate_perturbations,
    join,
    mean_log,
)
from bgen.evaluate.reports.perturbation import bar_figure, effect_figure, write_perturbation_report

ENERGY = next(metric for metric in METRICS if metric.key == "energy")


def cells(rng: np.random.Generator, shares: np.ndarray, n: int) -> sp.csr_matrix:
    library = rng.lognormal(7, 0.3, n)[:, None]
    return sp.csr_matrix(rng.poisson(rng.gamma(5, 0.2, (n, len(shares))) * library * shares).astype(np.float32))


def held_out(
    rng: np.random.Generator, scale: float = 1.0, strength: float = 1.0
) -> tuple[sp.csr_matrix, list[HeldOut]]:
    base = rng.dirichlet(np.full(80, 2.0))
    control = cells(rng, base, 400)
    made = []
    for number in range(6):
        effect = np.zeros(80)
        effect[rng.choice(80, 15, replace=False)] = rng.normal(0, strength, 15)
        real = cells(rng, base * np.exp(effect), 300)
        predicted = cells(rng, base * np.exp(scale * effect), 200)
        own = mean_log(predicted) - mean_log(control)
        made.append(HeldOut(f"p{number}", real, control, predicted, {"half": 0.5 * own}, np.array([], np.int64)))
    return control, made


def test_the_truth_is_at_the_ceiling_and_nothing_is_not() -> None:
    control, made = held_out(np.random.default_rng(0))
    scores = evaluate_perturbations(control, made)
    for key in ("pearson", "pearson_top", "discrimination", "direction"):
        assert scores.mean(MODEL, key) == pytest.approx(scores.mean(CEILING, key), abs=0.03)
    assert scores.mean(MODEL, "slope") == pytest.approx(1, abs=0.1)
    assert scores.mean("half", "slope") == pytest.approx(0.5, abs=0.05)
    assert scores.mean(MODEL, "energy") < 0.05 * scores.mean(CONTROL_COPY, "energy")
    assert scores.mean(CONTROL_COPY, "pearson") == 0
    assert scores.mean(CONTROL_COPY, "discrimination") < 0.8
    assert scores.verdict(CONTROL_COPY, ENERGY) == "better than"
    assert "control copy: the model is better than it in Pearson delta" in scores.sentences()[0]


def test_a_model_that_predicts_nothing_is_told_so() -> None:
    control, made = held_out(np.random.default_rng(1), scale=0.0)
    scores = evaluate_perturbations(control, made)
    assert scores.verdict(CONTROL_COPY, ENERGY) != "better than"
    assert abs(scores.mean(MODEL, "pearson")) < 0.2
    assert scores.as_json()["rows"]["control copy"]["energy"]["mean"] > 0


def test_too_few_real_cells_are_told() -> None:
    control, made = held_out(np.random.default_rng(2))
    few = HeldOut("x", made[0].real[:9], control, made[0].predicted, {}, np.array([], np.int64))
    with pytest.raises(UserError, match=r"at least 20 real cells.*x \(9\)"):
        evaluate_perturbations(control, [few])


def test_few_controls_do_not_set_an_effect_apart_from_its_other_half() -> None:
    control, made = held_out(np.random.default_rng(3), strength=0.3)
    few = [HeldOut(one.label, one.real, control[:10], one.predicted, {}, one.targets) for one in made]
    assert evaluate_perturbations(control, few).mean(CEILING, "discrimination") > 0.8


def test_few_controls_that_are_shared_are_the_reference_of_every_effect() -> None:
    control, made = held_out(np.random.default_rng(5), strength=0.1)
    split, shared = (
        evaluate_perturbations(
            control, [replace(one, control=control[:20], baselines={}, shared_controls=whole) for one in made]
        )
        for whole in (False, True)
    )
    assert shared.mean(MODEL, "slope") == pytest.approx(1, abs=0.1)
    assert split.mean(MODEL, "slope") > 1.3  # half of the controls' noise is in the prediction and in the real effect
    assert shared.mean(CEILING, "pearson") > split.mean(CEILING, "pearson") + 0.2
    assert shared.mean(MODEL, "energy") == pytest.approx(split.mean(MODEL, "energy"))


def test_a_baseline_may_consist_of_real_cells() -> None:
    control, made = held_out(np.random.default_rng(6))
    nothing = {"moved": np.zeros(80), "cells": np.zeros(80)}
    of_cells = [replace(one, baselines=nothing, populations={"cells": one.predicted}) for one in made]
    scores = evaluate_perturbations(control, of_cells)
    assert scores.mean("moved", "energy") == pytest.approx(scores.mean(CONTROL_COPY, "energy"))
    assert scores.mean("cells", "energy") == pytest.approx(scores.mean(MODEL, "energy"), abs=0.02)


def test_scores_of_several_trainings_are_joined() -> None:
    control, made = held_out(np.random.default_rng(4))
    first, second = evaluate_perturbations(control, made[:4]), evaluate_perturbations(control, made[4:])
    both = join([first, second], "perturbations")
    assert both.labels == tuple(one.label for one in made)
    assert both.mean(MODEL, "pearson") == pytest.approx(
        (4 * first.mean(MODEL, "pearson") + 2 * second.mean(MODEL, "pearson")) / 6
    )
    low, high = both.interval(MODEL, "pearson")
    assert low < both.mean(MODEL, "pearson") < high
    again = join([first, first], "seeds")
    assert again.interval(MODEL, "energy") == first.interval(MODEL, "energy")
    assert again.values[MODEL]["slope"].shape == (6, 4)


def test_the_page_shows_every_perturbation_and_the_slope(tmp_path: Path) -> None:
    control, made = held_out(np.random.default_rng(5), scale=0.5)
    scores = evaluate_perturbations(control, [replace(one, label=f"<{one.label}>") for one in made])
    page = write_perturbation_report(tmp_path / "report.html", scores, provenance={"model": "<m>"}).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert page.count("data:image/png") == 3
    assert "&lt;m&gt;" in page
    assert scores.sentences()[0] in page
    low, high = scores.interval(MODEL, "slope")
    assert f"{scores.mean(MODEL, 'slope'):.2f} ({low:.2f} to {high:.2f})" in page
    (bars,) = bar_figure(scores).axes
    assert {text.get_text() for text in bars.get_yticklabels()} == set(scores.labels)
    line = effect_figure(scores).axes[0].lines[-1]
    slope = np.diff(line.get_ydata()) / np.diff(line.get_xdata())
    assert slope == pytest.approx(0.5, abs=0.1)


def test_the_slope_nearer_to_one_is_better() -> None:
    """On either side of 1."""
    figures = {metric.key: np.full((2, 12), 0.5) for metric in METRICS}
    rows = {MODEL: 0.95, CONTROL_COPY: 0.2, "too large": 1.9, CEILING: 1.0}
    values = {row: figures | {"slope": np.full((2, 12), value)} for row, value in rows.items()}
    nothing = np.zeros((12, 3))
    scores = PerturbationScores(tuple("abcdefghijkl"), values, nothing, nothing)
    (slope,) = [metric for metric in METRICS if metric.key == "slope"]
    assert scores.verdict(CONTROL_COPY, slope) == "better than"
    assert scores.verdict("too large", slope) == "better than"
    worse = replace(scores, values=values | {MODEL: values[CONTROL_COPY], CONTROL_COPY: values[MODEL]})
    assert worse.verdict(CONTROL_COPY, slope) == "worse than"
