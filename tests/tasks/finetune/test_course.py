"""From a model of single cells and a time course to a model that fills in its missing time points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest

import bgen
from bgen.errors import UserError
from bgen.tasks.finetune.course import read_course
from bgen.tasks.finetune.finetune import Request, finetune
from bgen.tasks.time.axis import TimeAxis
from bgen.tasks.time.observed import read_times
from bgen.track.record import read

QUICK = ["train.steps=10", "train.eval_every=5", "train.global_batch=192", "track.progress=false"]


@pytest.fixture(scope="module")
def cells(demo: Any) -> anndata.AnnData:
    found = anndata.read_h5ad(demo.cells)
    found.obs["day"] = found.obs["time"] / 24
    del found.obs["time"]
    found.uns["time_unit"] = "days"
    return found


@pytest.fixture(scope="module")
def tuned(bgen: Any, demo: Any, cells: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command line's own example."""
    folder = tmp_path_factory.mktemp("course")
    cells.write_h5ad(folder / "course.h5ad")
    done = bgen(
        *("finetune", demo.model, folder / "course.h5ad", "--task", "time", "--time", "day", "--within", "donor"),
        *("--out", folder / "my-course", "--mode", "head", *QUICK),
    )
    assert done.code == 0, done
    return folder / "my-course" / "model"


def test_the_tuned_model_fills_in_and_forecasts(tuned: Path, cells: anndata.AnnData) -> None:
    model = bgen.load(tuned)
    assert model.saved.about.times == [0, 1, 2]
    made = model.interpolate(cells, 0.5, n=60, sample={"steps": 2})
    assert made.shape == (60, 120)
    assert set(made.obs["donor"]) == set(cells.obs["donor"])
    assert made.uns["time_unit"] == "days"
    at_day_1 = model.interpolate(cells, 1)
    assert at_day_1.n_obs == (cells.obs["day"] == 1).sum()
    rows = at_day_1.uns["bgen"]["scores"]["1"]["metrics"]["energy"]["rows"]
    assert rows["model"]["mean"] < rows["previous"]["mean"]  # it starts from the OT-midpoint
    assert model.forecast(cells, [2.0]).n_obs == (cells.obs["day"] == 2).sum()
    with pytest.raises(UserError, match="fill in"):
        model.generate(10)


@pytest.mark.parametrize("mode", [*(pytest.param(mode, marks=pytest.mark.slow) for mode in ("full", "head")), "lora"])
def test_a_model_over_time_lends_its_flow(demo: Any, course: Path, tmp_path: Path, mode: Any) -> None:
    cells = anndata.read_h5ad(demo.cells)
    request = Request("time", mode, time="time", system=["donor"])
    made = finetune(course, cells, tmp_path / "out", request, overrides=QUICK, say=lambda _: None).model
    assert made.about.trajectories is not None
    assert made.about.trajectories.times == 3
    assert made.about.finetuning is not None
    assert made.about.finetuning.parent.name == "course"
    assert bgen.load(tmp_path / "out" / "model").generate(20, times=[0, 48]).n_obs == 40
    before, after = (bgen.load(path).saved.module.state_dict() for path in (course, tmp_path / "out" / "model"))
    assert before.keys() == after.keys()
    changed = {name.removeprefix("backbone.") for name in before if not before[name].equal(after[name])}
    assert any(name.startswith("head.") for name in changed) == (mode != "lora")
    blocks = {name for name in changed if name.startswith("blocks.")}
    assert bool(blocks) == (mode != "head")
    assert all(name.endswith("weight") for name in blocks) == (mode != "full")


def test_low_rank_changes_need_layers_that_are_wide_enough(bgen: Any, demo: Any, course: Path, tmp_path: Path) -> None:
    narrow = bgen(
        *("train", "trajectories", f"out={tmp_path / 'run'}", f"data.store={demo.store}", f"flow.vae={demo.vae}"),
        *("data.trajectories={system: [donor], times: 3, cells: 16}", "flow.backbone={name: mlp, width: 16}"),
        *("train.steps=2", "train.global_batch=192", "train.eval_every=0", "track.mlflow=false"),
    )
    assert narrow.code == 0, narrow
    asked = ("finetune", tmp_path / "run" / "model", demo.cells, "--task", "time", "--time", "time", "--mode", "lora")
    done = bgen(*asked, "--out", tmp_path / "out")
    assert done.code == 2
    assert "32 wide or more" in done.err


@pytest.mark.parametrize(("parted", "into"), [(64, 4), pytest.param(96, 2, marks=pytest.mark.slow)])
def test_micro_batches_hold_whole_trajectories(parted: int, into: int, bgen: Any, demo: Any, tmp_path: Path) -> None:
    asked = ("finetune", demo.model, demo.cells, "--task", "time", "--time", "time", "--mode", "head", *QUICK)
    losses = {}
    for micro, parts in ((192, 1), (parted, into)):  # a trajectory is 3 time points x 16 cells
        out = tmp_path / str(micro)
        more = (f"train.micro_batch={micro}", "train.steps=8", "train.eval_every=4", "train.log_every=1")
        assert bgen(*asked, "--out", out, *more).code == 0
        plan = json.loads((out / "flow" / "deepspeed.json").read_text())
        assert plan["gradient_accumulation_steps"] == parts
        losses[micro] = [
            row["loss"] for row in read(out / "flow" / "record.jsonl") if row["kind"] in ("train", "valid")
        ]
    assert len(losses[192]) == 10
    assert losses[parted] == pytest.approx(losses[192], rel=1e-4)
    refused = bgen(*asked, "--out", tmp_path / "small", "train.micro_batch=32")
    assert refused.code == 2
    assert "no whole trajectory of 3 time points x 16 cells: give 48" in refused.err


def test_every_population_of_a_course_is_split(cells: anndata.AnnData) -> None:
    course = read_course(cells, "day", ["donor"])
    train, watched = course.split(0.15, 0)
    assert len(np.intersect1d(train, watched)) == 0
    assert len(train) + len(watched) == cells.n_obs
    for time in course.times:
        for code in (0, 1):
            here = (course.time == time) & (course.code == code)
            assert here[watched].sum() == pytest.approx(0.15 * here.sum(), abs=1)


def test_mistakes(demo: Any, bgen: Any, cells: anndata.AnnData) -> None:
    for column, match in ((None, "needs --time"), ("dai", "'day'"), ("cell_type", "holds no time")):
        with pytest.raises(UserError, match=match):
            read_course(cells, column, [])
    with pytest.raises(UserError, match="obs has no column 'donr'"):
        read_course(cells, "day", ["donr"])
    with pytest.raises(UserError, match="2 time points"):
        read_course(cells[cells.obs["day"] > 0], "day", [])
    spread = cells.copy()
    spread.obs["day"] = np.arange(spread.n_obs)
    with pytest.raises(UserError, match="round"):
        read_course(spread, "day", [])


def test_times_may_be_text_with_their_unit() -> None:
    obs = pd.DataFrame({"stage": np.repeat(["E8.5", "E9.5", "E10.5"], 20), "bad": ["24h", "late"] * 30})
    obs.index = [str(i) for i in range(60)]
    cells = anndata.AnnData(np.ones((60, 2), np.float32), obs=obs)
    course = read_course(cells, "stage", [])
    assert (course.times.tolist(), course.unit) == ([8.5, 9.5, 10.5], "days")
    assert "'E8.5' is 8.5" in course.read
    assert read_course(cells, "stage", [], "hours").times.tolist() == [204, 228, 252]
    with pytest.raises(UserError, match=r"no time for 30 of 60 cells \('late' \(30 cells\)\)"):
        read_course(cells, "bad", [])
    axis = TimeAxis("stage", "hours", np.array([0.0, 300.0]), [], 3, 8)
    assert np.unique(read_times(cells, axis, None)).tolist() == [204, 228, 252]
