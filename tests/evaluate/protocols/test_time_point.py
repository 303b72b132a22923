"""The protocol of a time point on populations whose order is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import sparse

from bgen.errors import UserError
from bgen.evaluate.protocols.scores import Estimate
from bgen.evaluate.protocols.time_point import (
    METRICS,
    TimeScores,
    evaluate_time_point,
    forecast_baselines,
    interpolation_baselines,
    mixed_counts,
    paired_verdict,
)

F64 = np.ndarray


def population(seed: int, at: float, n: int = 200) -> F64:
    """Cells on a circle's arc: the middle lies off the chord that the OT-midpoint takes."""
    x = np.random.default_rng(seed).normal(scale=0.3, size=(n, 4))
    return x + np.array([np.cos(at), np.sin(at), 0, 0])


PREVIOUS, MIDDLE, NEXT = population(0, 0.0), population(1, np.pi / 2), population(2, np.pi)


def scored(generated: F64, **options: int) -> TimeScores:
    return evaluate_time_point(MIDDLE, generated, interpolation_baselines(PREVIOUS, NEXT, 0.5), **options)


def test_real_cells_are_at_the_ceiling_and_copies_of_a_baseline_are_not() -> None:
    real = scored(population(3, np.pi / 2))
    assert {real.verdict(m.key) for m in METRICS} == {"at the ceiling"}
    assert {real.strongest(m.key) for m in METRICS} == {"OT-midpoint"}
    copied = scored(PREVIOUS)
    assert {copied.verdict(m.key) for m in METRICS} == {"worse than the baseline"}
    near = scored(population(3, np.pi / 2) - [0, 0.5, 0, 0])
    assert {near.verdict(m.key) for m in METRICS} == {"better than the baseline"}
    midpoint = interpolation_baselines(PREVIOUS, NEXT, 0.5)["OT-midpoint"].points
    assert {scored(midpoint).verdict(m.key) for m in METRICS} == {"no better than the baseline"}


def test_all_rows_have_as_many_cells() -> None:
    assert scored(population(3, np.pi / 2, 500)).cells == 100
    assert scored(population(3, np.pi / 2, 60)).cells == 60
    assert scored(population(3, np.pi / 2), max_cells=50).cells == 50
    with pytest.raises(UserError, match=r"at least on each side.*model 5"):
        scored(population(3, np.pi / 2, 5))
    with pytest.raises(UserError, match="at least 2"):
        scored(population(3, np.pi / 2), seeds=1)


def test_the_trend_goes_on_as_the_mean_went() -> None:
    pools = forecast_baselines(PREVIOUS + 2, PREVIOUS, 0.5)
    np.testing.assert_allclose(pools["trend"].points, PREVIOUS + 3)
    assert set(forecast_baselines(PREVIOUS, None, 1.0)) == {"previous"}


def test_mixed_counts_hold_as_much_of_either_side_as_the_way_tells() -> None:
    before, after = (sparse.csr_matrix(np.tile(row, (50, 1)).astype(np.float32)) for row in ([400, 0], [0, 400]))
    at = np.random.default_rng(0).normal(size=(50, 2))
    mixed = np.asarray(mixed_counts(before, after, at, at + 1, 0.25).mean(0)).ravel()
    np.testing.assert_allclose(mixed, [300, 100], atol=10)


def test_a_verdict_looks_at_differences_on_the_same_cells() -> None:
    noise = np.array([0.0, 0.5, 1.0])
    model, baseline, ceiling = (Estimate(tuple(level + noise)) for level in (2.0, 3.0, 1.0))
    assert paired_verdict(model, baseline, ceiling) == "better than the baseline"
    assert paired_verdict(baseline, model, ceiling) == "worse than the baseline"
    shaken = Estimate((2.0, 2.7, 2.4))
    assert paired_verdict(shaken, baseline, ceiling) == "no better than the baseline"
    low = Estimate(tuple(0.5 + noise))
    assert paired_verdict(ceiling, low, ceiling) == "worse than the baseline"


def test_scores_print_and_go_to_json() -> None:
    scores = scored(population(3, np.pi / 2))
    told = json.loads(json.dumps(scores.as_json()))
    assert told["metrics"]["w1"]["strongest_baseline"] == "OT-midpoint"
    assert "at the ceiling" in scores.headline()
    assert len(scores.table().rows) == 6
