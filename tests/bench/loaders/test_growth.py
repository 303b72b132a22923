"""What processes take for each cell: every step runs, and memory is what was taken."""

from __future__ import annotations

import json
import time
from pathlib import Path

import anndata
import numpy as np
import pytest

from bgen.bench.loaders import growth, memory
from bgen.bench.loaders.growth import EXPRESSED, GENES, STEPS, bench_growth, table, write_cells
from bgen.bench.loaders.memory import measure
from bgen.errors import UserError


def test_every_step_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_cells(tmp_path / "cells.h5ad", 6000)
    cells = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert cells.shape == (6000, GENES)
    assert set(np.diff(cells.X.indptr)) == {EXPRESSED}
    assert cells.obs_names.is_unique
    for step in STEPS.values():
        step(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.h5ad", "store"]  # so few cells are not shared


def test_memory_is_what_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what was given back before the end: it is sampled all the time."""
    np.zeros(4 << 20, np.uint8).tofile(tmp_path / "numbers")
    looked, look = [0], memory._resident

    def counted() -> dict[str, int]:
        looked[0] += 1
        return look()

    def work(folder: Path) -> object:
        taken = np.ones(64 << 20, np.uint8)
        enough = looked[0] + 2  # one of which began since
        while looked[0] < enough:
            time.sleep(0.001)
        del taken
        mapped = np.memmap(folder / "numbers", np.uint8, "r")
        return mapped, int(mapped.sum())

    monkeypatch.setattr(memory, "_resident", counted)
    found = measure(work, tmp_path)
    assert 62 << 20 < found["own"] < 96 << 20
    assert found["shared"] >= 3 << 20


def test_the_table_extrapolates() -> None:
    by = {n: {"own": 1e8 + 3.0 * n, "shared": 5.0 * n, "seconds": 1.0} for n in (1_000_000, 4_000_000)}
    assert table({"a": by}, sorted(by)).splitlines()[2] == "| a | 103 MB | 112 MB | 3.0 | 5.0 | 3.1 GB |"


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="twice or more"):
        bench_growth(tmp_path, cells=[1000, 1000])
    with pytest.raises(UserError, match="no step 'ranks'"):
        bench_growth(tmp_path, cells=[1000, 2000], steps=["ranks"])


@pytest.mark.slow
def test_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "FEW", 3000)  # of fewer, no cell is a control
    said: list[object] = []
    bench_growth(tmp_path, cells=[2000, 4000], steps=["rank, cells"], say=said.append)
    found = json.loads((tmp_path / "growth.json").read_text())
    assert list(found["steps"]) == ["build", "rank, cells"]
    assert all(one["own"] > 0 for by in found["steps"].values() for one in by)
    assert [path.name for path in tmp_path.iterdir()] == ["growth.json"]
    assert sum("CPU s" in str(line) for line in said) == 4
