"""Damaged files and senseless commands: the only outcomes are a valid result, or one message and exit code 2.

Every case is drawn from its kind, seed and number, so a failure says how to have it again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import anndata
import pytest
from prefork import python

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
KINDS = ("command", "h5ad", "model", "store", "zarr")
SEED = 14
MOST_MEMORY = 2.0
"""GB that a case may take."""

SOME = 12
"""Cases of each kind that every run of the tests looks at."""

TOGETHER = 50
"""Cases in one process."""


@pytest.fixture(scope="module")
def sources(demo: Any, bgen: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole inputs."""
    folder = tmp_path_factory.mktemp("sources")
    cells = anndata.read_h5ad(demo.cells)
    del cells.uns["truth"]  # a hundred arrays that no command reads: most damage would be done to them
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which version of zarr will be the default
        cells.write_h5ad(folder / "cells.h5ad")
        cells.write_zarr(folder / "cells.zarr")
    shutil.copytree(demo.store, folder / "store")
    shutil.copytree(demo.model, folder / "model")
    shutil.copytree(demo.flow, folder / "run")
    done = bgen(
        *["finetune", demo.model, demo.cells, "--task", "perturb", "--perturbation", "perturbation"],
        *["--control", "control", "--out", folder / "tuned", "train.steps=5", "track.mlflow=false"],
    )
    assert done.code == 0, done
    shutil.move(folder / "tuned" / "model", folder / "perturb")
    shutil.rmtree(folder / "tuned")
    return folder


def fuzz(kind: str, first: int, last: int, sources: Path, work: Path) -> list[str]:
    """Run cases; return what went wrong, a line each."""
    faults = []
    environment = os.environ | {"HOME": str(work), "MLFLOW_TRACKING_URI": str(work / "mlruns"), "COLUMNS": "200"}
    log = work / f"{kind}.jsonl"
    while first < last:
        end = min(first + TOGETHER, last)
        command = [python(), HERE / "run_cases.py", kind, SEED, first, end, sources, work]
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
        assert rows, done.stderr
        damage = {row["case"]: row for row in rows if "damage" in row}
        ended = {row["case"]: row for row in rows if "damage" not in row}
        reached = rows[-1]["case"] + 1
        if done.returncode != 0:  # the process died in a case
            assert rows[-1]["case"] >= first, done.stderr
            faults.append(f"{kind} {rows[-1]}: ended with {done.returncode}: {done.stderr[-1500:]}")
        faults += [
            f"{kind} {number}: {row['fault'] or ''} {row['memory_gb']} GB, {damage[number]}: {row['err']}"
            for number, row in ended.items()
            if "fault" in row and first <= number < end and (row["fault"] or row["memory_gb"] > MOST_MEMORY)
        ]
        first = reached
    return faults


@pytest.mark.parametrize("kind", KINDS)
def test_some_cases(kind: str, sources: Path, tmp_path: Path) -> None:
    faults = fuzz(kind, 0, SOME, sources, tmp_path)
    assert not faults, "\n\n".join(faults)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_cases(kind: str, sources: Path, tmp_path: Path) -> None:
    faults = fuzz(kind, SOME, SOME + 1000, sources, tmp_path)
    assert not faults, f"{len(faults)} faults\n" + "\n\n".join(faults[:40])
