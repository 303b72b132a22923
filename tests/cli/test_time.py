"""``bgen generate --times``, ``bgen interpolate`` and ``bgen forecast``, as their help says, and what they refuse."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest


def wrong(result: Any, *parts: str) -> None:
    """One message, exit code 2, no traceback."""
    assert result.code == 2, result
    said = " ".join((result.err + result.out).replace("│", " ").split())
    assert "Traceback" not in said
    for part in parts:
        assert part in said, said


def is_counts(cells: anndata.AnnData) -> bool:
    return bool((cells.X.data > 0).all() and np.array_equal(cells.X.data, np.rint(cells.X.data)))


@pytest.fixture
def here(demo: Any, course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the examples name."""
    (tmp_path / "runs" / "trajectories").mkdir(parents=True)
    (tmp_path / "runs" / "trajectories" / "model").symlink_to(course)
    (tmp_path / "model").symlink_to(course)
    (tmp_path / "cells.h5ad").symlink_to(demo.cells)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("verb", "model"),
    [("generate", "runs/"), ("interpolate", "model"), pytest.param("forecast", "model", marks=pytest.mark.slow)],
)
def test_the_example_of_the_help_runs(bgen: Any, here: Path, verb: str, model: str) -> None:
    shown = " ".join(bgen(verb, "--help").out.replace("│", " ").split())
    example = next(e for e in re.findall(r"Example: bgen (.*?\.h5ad)(?= |$)", shown) if f"{verb} {model}" in e)
    while example.count(".h5ad") < (1 if verb == "generate" else 2):
        example = re.search(rf"Example: bgen ({re.escape(example)}.*?\.h5ad)", shown)[1]
    arguments = shlex.split(example)
    done = bgen(*arguments)
    assert done.code == 0, done
    made = anndata.read_h5ad(arguments[-1])
    assert is_counts(made)
    if verb == "generate":
        assert made.obs["time"].value_counts().to_dict() == {0.0: 200, 24.0: 200, 48.0: 200}
        assert made.obs["trajectory"].nunique() == 13
    else:
        assert made.obs["time"].unique().tolist() == [float(arguments[arguments.index("--time") + 1])]


def test_steps_solver_guidance_and_library_are_what_was_asked(bgen: Any, here: Path) -> None:
    common = ["generate", "model", "--n", 96, "--times", "all", "--library-size", 500]
    made = {}
    for name, options in (
        ("one", ["--steps", 1, "--solver", "euler"]),
        ("eight", ["--steps", 8]),
        ("adaptive", ["--solver", "adaptive"]),
        ("guided", ["--steps", 8, "--guidance", 3]),
        ("nowhere", ["--steps", 8, "--guidance", 3, "--guidance-interval", 0.01, 0.02]),
    ):
        done = bgen(*common, *options, "--out", f"{name}.h5ad")
        assert done.code == 0, done
        made[name] = anndata.read_h5ad(f"{name}.h5ad")
        totals = np.asarray(made[name].X.sum(1)).ravel()
        assert totals.mean() == pytest.approx(500, rel=0.1)
    assert made["one"].uns["bgen"]["steps"] == 1
    assert abs(made["one"].X - made["eight"].X).nnz > 0
    assert abs(made["guided"].X - made["eight"].X).nnz > 0
    assert abs(made["nowhere"].X - made["eight"].X).nnz == 0  # 8 Heun steps evaluate at multiples of 1/8
    near = np.abs(made["adaptive"].X.mean(0) - made["eight"].X.mean(0)).mean()
    assert near < np.abs(made["one"].X.mean(0) - made["eight"].X.mean(0)).mean()


def test_scores_stand_beside_baselines_where_the_truth_is_there(bgen: Any, here: Path) -> None:
    done = bgen("interpolate", "model", "cells.h5ad", "--time", 24, "--out", "at24.h5ad", "--json")
    assert done.code == 0, done
    score = json.loads(done.out)["scores"]["24"]
    assert score["protocol"] == "time-point-v2"
    rows = score["metrics"]["w2"]["rows"]
    assert list(rows) == ["model", "previous", "next", "OT-midpoint", "OT-midpoint as counts", "ceiling"]
    assert rows["ceiling"]["mean"] < rows["previous"]["mean"]
    table = bgen("forecast", "model", "cells.h5ad", "--time", 48, "--out", "at48.h5ad")
    assert "trend" in table.out
    assert "was trained on cells of this time" in table.err
    silent = bgen("interpolate", "model", "cells.h5ad", "--time", 30, "--out", "at30.h5ad")
    assert "No score" in silent.out


def test_mistakes(bgen: Any, here: Path, demo: Any) -> None:
    out = ["--out", "x.h5ad"]
    cells = anndata.read_h5ad("cells.h5ad")
    del cells.uns["truth"]  # a hundred arrays, to write and to read each time
    for name, change in (
        ("untimed", lambda a: setattr(a, "obs", a.obs.rename(columns={"time": "timme"}))),
        ("holes", lambda a: setattr(a, "obs", a.obs.assign(time=a.obs["time"].where(a.obs["time"] > 0)))),
        ("days", lambda a: a.uns.update(time_unit="days")),
        ("genes", lambda a: setattr(a, "var", pd.DataFrame(index=[f"ENSG{i}" for i in range(a.n_vars)]))),
        ("logged", lambda a: setattr(a, "X", a.X.log1p())),
    ):
        changed = cells.copy()
        change(changed)
        changed.write_h5ad(f"{name}.h5ad")
    cells[cells.obs["time"] == 0].copy().write_h5ad("start.h5ad")
    at = ["--time", 24, *out]
    wrong(bgen("interpolate", "model", "untimed.h5ad", *at), "no column 'time'", "'timme'", "--time-column")
    wrong(bgen("interpolate", "model", "holes.h5ad", *at), "holds no number for")
    wrong(bgen("interpolate", "model", "days.h5ad", *at), "in days", "in hours")
    wrong(bgen("interpolate", "model", "genes.h5ad", *at), "0 of the 120 genes")
    wrong(bgen("interpolate", "model", "logged.h5ad", *at), "not counts")
    wrong(bgen("interpolate", "model", "nowhere.h5ad", *at), "no file nowhere.h5ad")
    wrong(bgen("interpolate", "model", "start.h5ad", *at), "on both sides", "the data have: 0")
    wrong(bgen("forecast", "model", "cells.h5ad", "--time", 0, *out), "before it")
    wrong(bgen("interpolate", "model", "cells.h5ad", "--time", 240, *out), "240 hours lies outside", "0 to 48 hours")
    wrong(bgen("interpolate", "model", "cells.h5ad", *at, "--where", "tissue=lung"), "no condition 'tissue'")
    wrong(bgen("interpolate", "model", "cells.h5ad", *at, "--where", "batch=batch_9"), "batch_9")
    wrong(bgen("interpolate", "model", "cells.h5ad", *at, "--solver", "rk"), "solver")
    wrong(bgen("interpolate", demo.model, "cells.h5ad", *at), "not trained on trajectories")
    wrong(bgen("generate", demo.model, "--times", "all", *out), "not trained on trajectories")
    wrong(bgen("generate", "model", "--times", "0,soon", *out), "numbers with commas")
    wrong(bgen("generate", "model", "--times", "0,96", *out), "96 hours lies outside")
    wrong(bgen("generate", "model", "--where", "time=24", *out), "runs along")
    wrong(bgen("generate", "model", "--guidance-interval", 0.9, 0.1, *out), "no range within 0 to 1")
    assert not Path("x.h5ad").exists()
