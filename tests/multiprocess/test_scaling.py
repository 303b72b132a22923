"""Two ranks on two cores beside one rank on one, each with the same cells per rank and step: the real VAE."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bgen.track.record import read

MICRO = 512
STEPS = 60
SETTINGS = [
    f"train.micro_batch={MICRO}",
    f"train.steps={STEPS}",
    "train.log_every=10",
    "train.eval_every=0",
    "train.patience=0",
    "train.checkpoint_every=1000",
    "train.zero=0",  # a model of this size fits: nothing is split, and less is sent
    "train.comms_log=true",
    "track.mlflow=false",
    "track.progress=false",
]


def cells_per_second(store: Path, run: Path, ranks: int, cores: str) -> tuple[float, float]:
    """Median speed, and the share of the time that collectives took."""
    command = ["taskset", "-c", cores, sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "-m", "bgen", "train", "vae", f"data.store={store}", f"out={run}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [f"train.global_batch={ranks * MICRO}", *SETTINGS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = read(run / "record.jsonl")
    trained = [row for row in rows if row["kind"] == "train"]
    speed = statistics.median(row["cells_per_s"] for row in trained[1:])
    (event,) = [row for row in rows if row.get("event") == "communication"]
    spent = sum(figures["ms"] for figures in event.values() if isinstance(figures, dict)) / 1e3
    return speed, spent / (STEPS * ranks * MICRO / speed)


@pytest.mark.slow  # wants a machine of its own
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_two_ranks_do_nearly_twice_the_work_of_one(bgen: Any, tmp_path: Path) -> None:
    store = tmp_path / "store"
    cells = tmp_path / "cells.h5ad"
    assert bgen("data", "simulate", "--cells", 6000, "--genes", 2000, "--out", cells).code == 0
    assert bgen("data", "build", cells, "--out", store).code == 0
    one, _ = cells_per_second(store, tmp_path / "one", 1, "0")
    two, share = cells_per_second(store, tmp_path / "two", 2, "0,1")
    print(f"1 rank {one:,.0f} cells/s, 2 ranks {two:,.0f}: {two / one:.2f} times; communication {share:.1%}")
    assert two > 1.7 * one
    assert share < 0.2
