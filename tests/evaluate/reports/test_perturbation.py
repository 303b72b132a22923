"""The page of predicted perturbations."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bgen.evaluate.metrics.effects import RatioMetric
from bgen.evaluate.protocols.perturbation import METRICS
from bgen.evaluate.protocols.perturbation_scores import (
    CEILING,
    CONTROL_COPY,
    DUPLICATE,
    MODEL,
    Figures,
    PerturbationScores,
)
from bgen.evaluate.reports.perturbation import (
    bar_figure,
    best_baselines,
    effect_figure,
    interval_figure,
    write_perturbation_report,
)

SHARES = {MODEL: 0.5, CONTROL_COPY: 0.0, "a": 0.1, "<b>": 0.4, "c": 0.2, "d": 0.3, DUPLICATE: 0.8, CEILING: np.nan}


@pytest.fixture
def scores() -> PerturbationScores:
    rng = np.random.default_rng(0)
    figures: dict[str, dict[str, Figures]] = {}
    for row, share in SHARES.items():
        figures[row] = {}
        for metric in METRICS:
            over = (0.5 if np.isnan(share) else share) + rng.normal(0, 0.05, (2, 12))
            if isinstance(metric, RatioMetric):
                over = np.full((2, 12), share) + rng.normal(0, 0.05, (2, 12))
                figures[row][metric.key] = Figures(over, np.ones((2, 12)), np.zeros((3, 2, 12)))
            else:
                figures[row][metric.key] = Figures(over)
    real = rng.normal(size=(12, 30))
    real[:, 3] = np.nan
    names = tuple(f"<p{number}>" for number in range(12))
    return PerturbationScores(names, names, figures, 2 * real, real, "perturbation-v4", METRICS)


def test_the_page_shows_every_row_and_perturbation(tmp_path: Path, scores: PerturbationScores) -> None:
    page = write_perturbation_report(tmp_path / "report.html", scores, provenance={"model": "<m>"}).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert page.count("data:image/png") == 3
    assert "&lt;m&gt;" in page
    assert "<b>" not in re.sub(r"<b>[^<]*</b>: ", "", page)
    assert f'<p class="headline">{scores.headline().replace("<", "&lt;").replace(">", "&gt;")}</p>' in page
    assert "the best baseline (&lt;b&gt;) explains 4" in page
    assert "slope" not in page
    first, second = re.findall(r"<thead><tr>(.*?)</tr></thead>", page)[:2]
    assert re.findall(r">([^<>]+)</th>", first) == [MODEL, "&lt;b&gt;", "d", "c", DUPLICATE, CEILING]
    assert re.findall(r">([^<>]+)</th>", second) == [MODEL, CONTROL_COPY, "a", "&lt;b&gt;", "c", "d"]
    (bars,) = bar_figure(scores).axes
    assert {text.get_text() for text in bars.get_yticklabels()} == set(scores.labels)
    panels = [axis for axis in interval_figure(scores).axes if axis.get_visible()]
    assert len(panels) == len(METRICS)
    assert {text.get_text() for text in panels[0].get_yticklabels()} == set(SHARES)


def test_the_line_is_the_calibration(scores: PerturbationScores) -> None:
    identity, line = effect_figure(scores).axes[0].lines
    assert np.diff(identity.get_ydata()) == pytest.approx(np.diff(identity.get_xdata()))
    slope = np.diff(line.get_ydata()) / np.diff(line.get_xdata())
    assert slope == pytest.approx(scores.mean(MODEL, "calibration"))
    without = {row: of_row | {"calibration": of_row["calibration"].without()} for row, of_row in scores.figures.items()}
    assert len(effect_figure(replace(scores, figures=without)).axes[0].lines) == 1


def test_the_best_baselines_come_first(scores: PerturbationScores) -> None:
    assert best_baselines(scores) == ["<b>", "d", "c"]


def test_one_perturbation_has_a_page_without_intervals(tmp_path: Path, scores: PerturbationScores) -> None:
    alone = np.arange(12) == 0
    figures = {row: {key: one.of(alone) for key, one in of_row.items()} for row, of_row in scores.figures.items()}
    one = replace(
        scores, labels=("p",), names=("p",), figures=figures, predicted=scores.predicted[:1], real=scores.real[:1]
    )
    page = write_perturbation_report(tmp_path / "report.html", one).read_text()
    assert "nan" not in re.sub(r'src="[^"]*"', "", page)
    assert "too few perturbations to tell" in page
