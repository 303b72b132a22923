"""The protocol of a time point on populations whose order is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import sparse

from bgen.errors import UserError
from bgen.evaluate.protocols.time_point import (
    METRICS,
    TimeScores,
    evaluate_time_point,
    forecast_baselines,
    interpolation_baselines,
    mixed_counts,
)

F64 = np.ndarray


def population(seed: int, at: float, n: int = 200) -> F64:
    """Cells on a circle's arc: the middle lies off the chord that the OT-midpoint takes."""
    x = np.random.default_rng(seed).normal(scale=0.3, size=(n, 4))
    return x + np.array([np.cos(at), np.sin(at), 0, 0])


MIDDLES = population(1, np.pi / 2, 1000)
PREVIOUS, MIDDLE, NEXT = population(0, 0.0), population(1, np.pi / 2), population(2, np.pi)


def scored(generated: F64, middle: F64 | None = None, **options: int) -> TimeScores:
    known = interpolation_baselines(PREVIOUS, NEXT, 0.5)
    return evaluate_time_point(MIDDLE if middle is None else middle, generated, known, **options)


def test_real_cells_are_at_the_ceiling_and_copies_of_a_baseline_are_not() -> None:
    real = scored(population(3, np.pi / 2, 500), MIDDLES)
    assert {real.strongest(m.key) for m in METRICS} == {"OT-midpoint"}
    told = {m.key: real.score(m).judgement for m in METRICS}
    assert all(judged is not None and judged.better and not judged.differs for judged in told.values())
    assert {real.verdict(key) for key in ("energy", "mmd2")} <= {"at the ceiling", "better than the baseline"}
    copied = scored(PREVIOUS)
    assert {copied.verdict(m.key) for m in METRICS} == {"worse than the baseline"}
    near = scored(population(3, np.pi / 2) - [0, 0.5, 0, 0])
    assert {near.verdict(m.key) for m in METRICS} == {"better than the baseline"}
    midpoint = interpolation_baselines(PREVIOUS, NEXT, 0.5)["OT-midpoint"].points
    same = scored(midpoint)
    assert {same.verdict(m.key) for m in METRICS} == {"cannot tell"}


def test_noise_never_brings_a_time_point_to_the_ceiling() -> None:
    """Fewer cells may only take words away; the first protocol gave "at the ceiling" to what was noisy enough."""
    off = population(3, np.pi / 2, 400) - [0, 0.25, 0, 0]
    for n in (100, 30, 12):
        found = scored(off, max_cells=n)
        assert "at the ceiling" not in {found.verdict(m.key) for m in METRICS}, n


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


def test_scores_print_and_go_to_json() -> None:
    scores = scored(population(3, np.pi / 2))
    told = json.loads(json.dumps(scores.as_json()))
    assert told["metrics"]["w1"]["strongest_baseline"] == "OT-midpoint"
    assert told["metrics"]["w1"]["verdict"] in scores.headline()
    assert told["metrics"]["w1"]["errors"]["splits"] == 24
    assert len(scores.table().rows) == 6
    assert "OT-midpoint" in scores._repr_html_()  # what a notebook shows
