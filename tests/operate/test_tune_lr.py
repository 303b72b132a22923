"""`bgen tune lr`: where the loss falls fastest, well below where it rises; the same twice, and no run behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bgen.errors import UserError
from bgen.operate.tune_lr import BELOW, judge, smooth
from bgen.track.record import read

RATES = np.geomspace(1e-6, 1.0, 121)


def curve(falls: float, rises: float) -> list[float]:
    """A loss of 10 that falls to 4 about one rate and rises without end from another on."""
    x = np.log10(RATES)
    fallen = 10 - 6 / (1 + np.exp(-6 * (x - np.log10(falls))))
    noise = 0.02 * np.random.default_rng(0).standard_normal(len(x))
    return (fallen + 40 * np.clip(x - np.log10(rises), 0, None) ** 2 + noise).tolist()


def test_the_steepest_descent_is_found() -> None:
    found = judge(RATES.tolist(), curve(falls=1e-3, rises=0.1), whole=False)
    assert 0.5e-3 < found.suggestion < 2e-3
    assert found.rises is not None
    assert 0.01 < found.rises < 0.25  # what rises without end is seen before it, through the smoothing
    assert found.setting == f"train.learning_rate={found.suggestion:g}"


def test_the_suggestion_stays_well_below_where_the_loss_rises() -> None:
    """The loss falls fastest just before it rises."""
    found = judge(RATES.tolist(), curve(falls=0.05, rises=0.1), whole=False)
    assert found.rises is not None
    assert found.suggestion <= found.rises / BELOW * 1.05  # two digits
    assert found.suggestion > found.rises / BELOW / 3


def test_a_loss_that_never_rises_limits_nothing() -> None:
    found = judge(RATES.tolist(), (10 - np.log10(RATES) ** 3 / 1e3 - RATES).tolist(), whole=True)
    assert found.rises is None
    assert found.suggestion > 0.1


def test_a_loss_that_falls_nowhere_is_said() -> None:
    with pytest.raises(UserError, match="falls nowhere between the rates 1e-06"):
        judge(RATES.tolist(), np.linspace(1, 2, len(RATES)).tolist(), whole=True)
    with pytest.raises(UserError, match="after 5 steps: begin with a lower --low"):
        judge(RATES.tolist()[:5], [1.0] * 5, whole=False)


def test_smoothing_moves_no_edge() -> None:
    step = np.repeat([1.0, 0.0], 30)
    smoothed = smooth(step, 3.0)
    assert smoothed[29] + smoothed[30] == pytest.approx(1.0)
    assert (np.diff(smoothed) <= 0).all()
    assert smooth(np.full(9, 2.5), 2.0) == pytest.approx(np.full(9, 2.5))


def test_the_verb_begins_as_the_run_would_and_leaves_none(bgen: Any, demo: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = [f"data.store={demo.store}", f"out={out}", "train.global_batch=64", "track.mlflow=false"]
    asked = ["tune", "lr", "demo/vae", *settings, "--steps", "30", "--low", "1e-5", "--picture", tmp_path / "lr.png"]
    first = bgen(*asked, "--json")
    assert first.code == 0, first
    found = json.loads(first.out)
    assert json.loads(bgen(*asked, "--json").out) == found
    assert not out.exists()
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
    assert found["rates"][0] == pytest.approx(1e-5)
    assert 1e-5 < found["suggestion"] < 1.0
    assert min(found["losses"]) < found["losses"][0]
    told = bgen(*asked)
    assert told.out.splitlines()[-1] == found["setting"]
    assert f"{found['rates'][0]:.2e}" in told.out
    quick = ["train.steps=1", "train.eval_every=0", "train.log_every=1", "train.patience=0", "track.progress=false"]
    assert bgen("train", "demo/vae", *settings, *quick, found["setting"]).code == 0
    (row,) = [row for row in read(out / "record.jsonl") if row["kind"] == "train"]
    assert row["loss"] == pytest.approx(found["losses"][0], rel=1e-4)  # threads


def test_a_range_that_is_none_is_one_message(bgen: Any, tmp_path: Path) -> None:
    done = bgen(
        "tune", "lr", "demo/vae", f"data.store={tmp_path}", f"out={tmp_path / 'run'}", "--low", "1", "--high", "0.1"
    )
    assert (done.code, done.out) == (2, "")
    assert "--low 1 must be above 0 and below --high 0.1" in done.err
