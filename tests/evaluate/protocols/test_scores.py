from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bgen.errors import UserError
from bgen.evaluate.metrics.memorisation import Memorisation
from bgen.evaluate.metrics.metric import Better, Metric
from bgen.evaluate.protocols.distribution import METRICS
from bgen.evaluate.protocols.scores import Estimate, LabelScore, NumberScore, Score, Scores
from bgen.evaluate.protocols.verdicts import Errors


def score(model: float, baseline: float, ceiling: float, better: Better = "lower", error: float = 0.02) -> Score:
    def estimate(mean: float) -> Estimate:
        return Estimate((mean - 0.01, mean, mean + 0.01))

    metric = Metric("w2", "2-Wasserstein", better, 2, "Effort.", lambda _: 0.0, 0.1)
    return Score(metric, estimate(model), estimate(baseline), estimate(ceiling), Errors(error, error, error, splits=24))


def test_estimate() -> None:
    assert Estimate((1.0, 2.0, 3.0)).mean == 2.0
    assert Estimate((1.0, 2.0, 3.0)).sd == 1.0
    assert Estimate((0.4, 0.7)).shortfall("half").values == pytest.approx((0.1, 0.2))
    assert Estimate((0.4, 0.7)).shortfall("higher").values == pytest.approx((0.6, 0.3))


@pytest.mark.parametrize(
    ("model", "baseline", "ceiling", "better", "verdict"),
    [
        (5.05, 8.0, 5.0, "lower", "at the ceiling"),
        (4.0, 8.0, 5.0, "lower", "at the ceiling"),
        (6.5, 8.0, 5.0, "lower", "better than the baseline"),
        (7.99, 8.0, 5.0, "lower", "cannot tell"),
        (9.0, 8.0, 5.0, "lower", "worse than the baseline"),
        (0.90, 0.5, 0.92, "higher", "at the ceiling"),
        (0.70, 0.5, 0.92, "higher", "better than the baseline"),
        (0.20, 0.5, 0.92, "higher", "worse than the baseline"),
        (0.65, 0.9, 0.51, "half", "better than the baseline"),
        (0.35, 0.9, 0.51, "half", "better than the baseline"),
        (0.02, 0.9, 0.51, "half", "worse than the baseline"),
        (0.50, 0.9, 0.51, "half", "at the ceiling"),
        (5.0, 5.0, 5.0, "lower", "cannot tell"),
    ],
)
def test_verdicts(model: float, baseline: float, ceiling: float, better: Better, verdict: str) -> None:
    assert score(model, baseline, ceiling, better).verdict == verdict


def test_without_errors_nothing_can_be_told() -> None:
    known = score(5.0, 8.0, 5.0)
    assert Score(known.metric, known.model, known.baseline, known.ceiling).verdict == "cannot tell"


def test_a_relative_margin_is_a_share_of_the_ceiling() -> None:
    known = score(5.0, 8.0, 5.0)
    assert known.margin == pytest.approx(0.1)
    assert replace(known, metric=replace(known.metric, relative=True)).margin == pytest.approx(0.5)


def full() -> Scores:
    scores = tuple(
        Score(
            metric,
            Estimate((-0.12341, -0.12350)),
            Estimate((12.5, 12.6)),
            Estimate((0.00001, 0.0)),
            Errors(0.01, 0.01, 0.01, 8),
        )
        for metric in METRICS
    )
    return Scores("distribution-v2", 754, 2, {"genes": 16791, "cell_type": None}, scores, ("A note.",))


def test_table_fits_80_columns() -> None:
    console = Console(width=80, record=True)
    console.print(full().table())
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for metric in METRICS:
        assert metric.title in text
    assert "-0.1235±0.0001" in text


def test_printed_zero_has_no_sign() -> None:
    assert score(-0.0001, 1.0, 0.0).cell("model") == "0.00±0.01"


def test_headline_in_plain_words() -> None:
    parts = (score(5.0, 8.0, 5.0), score(6.5, 8.0, 5.0), score(9.0, 8.0, 5.0), score(5.0, 5.0, 5.0))
    copied = Memorisation(1.0, 2.0, 0.05, 0.0, 0.001, 0.5, 0.5, 300)
    scores = Scores("p", 10, 3, {}, parts, asked=("Asked for kind (2 labels), delivered.",), copied=copied)
    assert scores.headline() == (
        f"Asked for kind (2 labels), delivered. {copied.sentence()} Generated cells are as good as unseen real cells"
        " in 2 of 4 measures (the baseline: in 1), better than the baseline in 1 more and clearly worse than real cells"
        " in 2 (2-Wasserstein, 2-Wasserstein)."
    )
    said = (
        "Asked for kind (2 labels), not delivered for a: b (1 of 9): a classifier agrees.",
        "Asked for time, x: its",
    )
    two = replace(scores, asked=said).headline()
    assert two.startswith("Asked for kind (2 labels), not delivered for a: b (1 of 9); for time, x. ")
    honest = replace(copied, p_copies=0.5)
    assert replace(scores, copied=honest, asked=()).headline().startswith("Generated cells are")


def test_scores_are_read_again(tmp_path: Path) -> None:
    label = LabelScore("kind", "B", 3, 4, 5, 6, 0.5, {"model": 1.0, "baseline": 2.0, "ceiling": 0.5}, {})
    number = NumberScore("time", (1.0, 2.0), (1.5, 2.5), (1.0,), (2.0,))
    copied = Memorisation(1.0, 2.0, 0.05, 0.0, 0.001, 0.5, 0.5, 300)
    scores = replace(full(), labels=(label,), numbers=(number,), asked=("Asked.",), copied=copied)
    scores.save(tmp_path / "metrics.json")
    assert Scores.load(tmp_path / "metrics.json").as_json() == scores.as_json()


def test_a_file_of_the_first_protocol_is_read(tmp_path: Path) -> None:
    """As bgen wrote it before verdicts had errors: what it said stands."""
    row = {"mean": 5.0, "sd": 0.1, "values": [4.9, 5.1]}
    w2 = {"title": "2-Wasserstein", "better": "lower", **dict.fromkeys(("model", "baseline", "ceiling"), row)}
    told = {
        "protocol": "distribution-v1",
        "headline": "Generated cells are as close to unseen real cells as other real cells are in 1 of 1 measures.",
        "cells": 100,
        "subsamples": 2,
        "setting": {"genes": 60, "cell_type": None},
        "metrics": {"w2": {**w2, "verdict": "no better than the baseline"}},
        "notes": ["Only 100 cells on each side: the figures are rough."],
    }
    (tmp_path / "metrics.json").write_text(json.dumps(told))
    scores = Scores.load(tmp_path / "metrics.json")
    assert scores["w2"].verdict == "no better than the baseline"
    assert scores["w2"].model.values == (4.9, 5.1)
    assert scores.headline() == told["headline"]
    assert scores.as_json().items() >= {k: v for k, v in told.items() if k != "metrics"}.items()
    console = Console(width=80, record=True)
    console.print(scores.table())
    assert "no better" in console.export_text()
    (tmp_path / "other.json").write_text('{"protocol": "x"}')
    with pytest.raises(UserError, match="no scores of generated cells"):
        Scores.load(tmp_path / "other.json")


def test_saved_json(tmp_path: Path) -> None:
    full().save(tmp_path / "metrics.json")
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved["protocol"] == "distribution-v2"
    assert saved["metrics"]["w2"]["model"]["values"] == [-0.12341, -0.1235]
    assert saved["metrics"]["w2"]["verdict"] == "at the ceiling"
    assert saved["metrics"]["w2"]["errors"]["splits"] == 8
    assert saved["comparisons"] == len(METRICS)
    assert saved["setting"]["cell_type"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_look_up() -> None:
    assert full()["recall"].metric.better == "higher"
    with pytest.raises(KeyError):
        full()["nothing"]
