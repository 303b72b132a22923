"""``bgen bench time``: a curved course, where a straight line is wrong and the flow can know; the command on counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bgen.bench.quality.time import MODEL, bench_time
from bgen.bench.quality.time_latents import Course, generate, recipe, train
from bgen.errors import UserError
from bgen.models.backbones.size import backbone_parameters


def curved(cells: int = 150) -> Course:
    """So many cells a time point, whose mean goes along a parabola; straight lines cut its corners."""
    rng = np.random.default_rng(0)
    times = np.repeat(np.arange(5.0), cells)
    points = 0.3 * rng.normal(size=(len(times), 3)) + np.stack([times, 0.5 * times**2, 0 * times], 1)
    return Course(points.astype(np.float32), times)


@pytest.mark.parametrize("forecast", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_flow_learns_what_a_straight_line_misses(forecast: bool, tmp_path: Path) -> None:
    course = curved()
    rest, real = course.without(2.0), course.at(2.0)
    straight = (rest.at(1.0).mean(0) + rest.at(3.0).mean(0)) / 2
    assert np.linalg.norm(straight - real.mean(0)) > 0.4
    settings = recipe(steps=60, cells=64, forecast=forecast)  # learns forecasts, much larger, besides
    made = generate(train(rest, settings, 0, tmp_path / "run"), rest, 2.0, 150, settings, 0)
    assert made.shape == (150, 3)
    assert np.linalg.norm(made.mean(0) - real.mean(0)) < 0.2


def test_the_table_stands_beside_peers(tmp_path: Path) -> None:
    course = curved(60)
    table = pd.DataFrame(course.cells).assign(samples=course.time)
    table[table["samples"] < 4].to_csv(tmp_path / "emt.csv", index=False)
    said: list[str] = []
    found = bench_time("emt", tmp_path / "emt.csv", tmp_path / "out", seeds=2, points=[1.0], steps=40, say=said.append)
    assert found.rows() == [MODEL, "previous", "next", "OT-midpoint", "OT-CFM", "real halves"]
    assert found.verdicts("w1")["previous"] in ("at the ceiling", "better than the baseline")
    assert found.estimate("OT-midpoint", "w1").sd == 0
    assert len(said) == 2
    assert json.loads((tmp_path / "out" / "time.json").read_text())["data"] == "emt"
    for arguments, message in (
        ({"data": "emtt"}, "'emt'"),
        ({"path": tmp_path / "no.csv"}, "no file"),
        ({"points": [0.0]}, "inner time point"),
        ({"seeds": 1}, "at least 2"),
    ):
        given = {"data": "emt", "path": tmp_path / "emt.csv", "seeds": 2, "points": None, "steps": 1} | arguments
        out = tmp_path / "other"
        with pytest.raises(UserError, match=message):
            bench_time(given.pop("data"), given.pop("path"), out, say=said.append, **given)  # type: ignore[misc]


def test_counts_go_the_way_of_a_user(bgen: Any, demo: Any, tmp_path: Path) -> None:
    done = bgen(
        *["bench", "time", demo.cells, "--data", "simulated", "--point", 24, "--seeds", 2, "--steps", 2],
        *["--out", tmp_path / "bench"],
    )
    assert done.code == 0, done
    told = json.loads((tmp_path / "bench" / "time.json").read_text())
    assert set(told["means"]) >= {"bgen flow", "OT-midpoint", "OT-midpoint as counts", "real halves"}
    assert [path.name for path in (tmp_path / "bench").iterdir()] == ["time.json"]


@pytest.mark.slow  # one more variant of the test before
def test_forecasts_stand_beside_the_last_time_point(bgen: Any, demo: Any, tmp_path: Path) -> None:
    asked = ["bench", "time", "--seeds", 2, "--steps", 20, "--solver-steps", 1, "--forecast", "--out", tmp_path / "out"]
    done = bgen(*asked, demo.cells, "--data", "simulated")
    assert done.code == 0, done
    rows = set(json.loads((tmp_path / "out" / "time.json").read_text())["means"])
    assert rows == {"bgen flow", "previous", "real halves"}  # no trend: one time point stands before the inner one
    (tmp_path / "emt.csv").write_text("samples,a\n0,1\n")
    wrong = bgen(*asked[:-1], tmp_path / "new", tmp_path / "emt.csv", "--data", "emt")
    assert wrong.code == 2
    assert "courses of counts" in wrong.err


def test_another_mixer_has_about_as_many_parameters_and_trains(tmp_path: Path) -> None:
    own = backbone_parameters(17, recipe().flow.backbone)
    for mixer in ("mamba2", "s4d", "attention", "none"):
        backbone = recipe(mixer=mixer).flow.backbone
        assert abs(backbone_parameters(17, backbone) / own - 1) < 0.15
        assert ("time" in backbone.axes) == (mixer != "none")
        train(curved(), recipe(steps=2, cells=16, mixer=mixer), 0, tmp_path / mixer)
    with pytest.raises(UserError, match="no mixer over time 'atention'"):
        recipe(mixer="atention")
