from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from bgen.evaluate.metrics.metric import Better, Metric
from bgen.evaluate.protocols.distribution import METRICS
from bgen.evaluate.protocols.scores import Estimate, Score, Scores


def score(model: float, baseline: float, ceiling: float, better: Better = "lower", sd: float = 0.01) -> Score:
    def estimate(mean: float) -> Estimate:
        return Estimate((mean - sd, mean, mean + sd))

    metric = Metric("w2", "2-Wasserstein", better, 2, "Effort.", lambda _: 0.0)
    return Score(metric, estimate(model), estimate(baseline), estimate(ceiling))


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
        (7.9, 8.0, 5.0, "lower", "no better than the baseline"),
        (9.0, 8.0, 5.0, "lower", "worse than the baseline"),
        (0.90, 0.5, 0.92, "higher", "at the ceiling"),
        (0.70, 0.5, 0.92, "higher", "better than the baseline"),
        (0.20, 0.5, 0.92, "higher", "worse than the baseline"),
        (0.60, 0.9, 0.51, "half", "better than the baseline"),
        (0.40, 0.9, 0.51, "half", "better than the baseline"),
        (0.02, 0.9, 0.51, "half", "worse than the baseline"),
        (0.50, 0.9, 0.51, "half", "at the ceiling"),
        (5.0, 4.9, 5.0, "lower", "at the ceiling"),
    ],
)
def test_verdicts(model: float, baseline: float, ceiling: float, better: Better, verdict: str) -> None:
    assert score(model, baseline, ceiling, better).verdict == verdict


def test_a_difference_within_the_noise_does_not_count() -> None:
    assert score(6.5, 8.0, 5.0, sd=0.01).verdict == "better than the baseline"
    assert score(6.5, 8.0, 5.0, sd=0.6).verdict == "at the ceiling"
    assert score(7.5, 8.0, 5.0, sd=0.3).verdict == "no better than the baseline"


def test_a_noisy_baseline_does_not_bring_the_model_to_the_ceiling() -> None:
    calm, metric = score(6.5, 8.0, 5.0), score(6.5, 8.0, 5.0).metric
    noisy = Score(metric, calm.model, Estimate((5.0, 8.0, 11.0)), calm.ceiling)
    assert noisy.verdict == "no better than the baseline"
    assert Score(metric, calm.ceiling, noisy.baseline, calm.ceiling).verdict == "at the ceiling"


def full() -> Scores:
    scores = tuple(
        Score(metric, Estimate((-0.12341, -0.12350)), Estimate((12.5, 12.6)), Estimate((0.00001, 0.0)))
        for metric in METRICS
    )
    return Scores("distribution-v1", 754, 2, {"genes": 16791, "cell_type": None}, scores, ("A note.",))


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
    headline = Scores("p", 10, 3, {}, parts).headline()
    assert headline == (
        "Generated cells are as close to unseen real cells as other real cells are in 2 of 4 measures (the baseline: "
        "in 1), better than the baseline in 1 more and no better than the baseline in 1."
    )


def test_saved_json(tmp_path: Path) -> None:
    full().save(tmp_path / "metrics.json")
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved["protocol"] == "distribution-v1"
    assert saved["metrics"]["w2"]["model"]["values"] == [-0.12341, -0.1235]
    assert saved["metrics"]["w2"]["verdict"] == "at the ceiling"
    assert saved["setting"]["cell_type"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_look_up() -> None:
    assert full()["recall"].metric.better == "higher"
    with pytest.raises(KeyError):
        full()["nothing"]
