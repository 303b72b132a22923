"""The hybrid backbone on simulated lineages from the command line: the same losses however the work is split."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from prefork import torchrun

from bgen.track.record import read

STEPS = 4
SETTINGS = [
    f"train.steps={STEPS}",
    "train.global_batch=192",
    "train.eval_every=4",
    "train.log_every=1",
    "train.eval_cells=192",
    "train.ema=0.9",
    "track.mlflow=false",
    "track.progress=false",
    "flow.conditions=[time]",
    "data.trajectories={system: [cell_type, perturbation], times: 3, cells: 16}",
]


def losses(run: Path, kind: str = "train") -> list[float]:
    return [row["loss"] for row in read(run / "record.jsonl") if row["kind"] == kind]


def arguments(demo: Any, run: Path, zero: int, recompute: bool) -> list[str]:
    backbone = f"flow.backbone={{name: hybrid, width: 32, layers: 1, time: {{scale: 24}}, recompute: {recompute}}}"
    folders = [f"out={run}", f"data.store={demo.store}", f"flow.vae={demo.vae}"]
    return ["train", "demo/flow", *folders, *SETTINGS, backbone, f"train.zero={zero}"]


@pytest.fixture(scope="module")
def alone(bgen: Any, demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank."""
    run: Path = tmp_path_factory.mktemp("alone") / "run"
    made = bgen(*arguments(demo, run, 0, False))
    assert made.code == 0, made.err
    assert len(losses(run)) == STEPS
    assert all(0 < loss < 5 for loss in losses(run))
    figures = [row for row in read(run / "record.jsonl") if row["kind"] == "train"][-1]
    assert figures["tflops_per_s"] > 0
    assert "mfu" not in figures
    return run


@pytest.mark.parametrize(("zero", "recompute"), [(0, True), (1, False), (2, True), (3, False)])
def test_one_rank(alone: Path, bgen: Any, demo: Any, tmp_path: Path, zero: int, recompute: bool) -> None:
    made = bgen(*arguments(demo, tmp_path / "run", zero, recompute))
    assert made.code == 0, made.err
    for kind in ("train", "valid"):
        assert losses(tmp_path / "run", kind) == pytest.approx(losses(alone, kind), rel=1e-5)


@pytest.mark.parametrize(
    ("zero", "recompute"),
    [
        pytest.param(0, False, marks=pytest.mark.slow),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(2, False, marks=pytest.mark.slow),
        (3, True),
    ],
)
def test_two_ranks(alone: Path, demo: Any, tmp_path: Path, zero: int, recompute: bool) -> None:
    command = [*torchrun(2), "-m", "bgen", *arguments(demo, tmp_path / "run", zero, recompute)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for kind in ("train", "valid"):
        assert losses(tmp_path / "run", kind) == pytest.approx(losses(alone, kind), rel=1e-5)


def test_ranks_that_would_split_a_trajectory_are_told(demo: Any, tmp_path: Path, bgen: Any) -> None:
    made = bgen(*arguments(demo, tmp_path / "run", 0, False), "train.global_batch=100")
    assert made.code == 2
    assert "nearest that is: 96" in made.err
