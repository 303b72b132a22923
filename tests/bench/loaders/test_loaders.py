from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bgen.bench.loaders.atlas import Atlas
from bgen.bench.loaders.loaders import Case, _random_types, _with_ratios, bench_loader, cases, prepare
from bgen.bench.loaders.report import show
from bgen.bench.loaders.worker import Job, measure
from bgen.errors import UserError


@pytest.fixture(scope="module")
def folder(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("cache"), atlas, {}, {}, lambda said: None)


@pytest.mark.slow  # starts twenty processes that each import torch
def test_bgen_alone(tmp_path: Path) -> None:
    said: list[str] = []
    settings: dict[str, Any] = {"cells": 3000, "atlas_folder": tmp_path / "cache", "peers": [], "batches": [256]}
    settings |= {"seconds": 0.2, "repetitions": 2}
    result = bench_loader(tmp_path / "out", **settings, say=said.append)
    assert json.loads((tmp_path / "out" / "loader.json").read_text()) == result
    assert (tmp_path / "out" / "loader.png").stat().st_size > 10_000
    rows = {(row["path"], row["form"], row["threads"]): row for row in result["rows"]}
    assert len(rows) == 10
    assert rows["small", "trajectories", 1]["cpu_per_cell_over_csr"] == pytest.approx(
        rows["small", "csr", 1]["cpu_rate"] / rows["small", "trajectories", 1]["cpu_rate"]
    )
    for row in rows.values():
        assert row["cpu_rate"] > 1000
        assert row["wall_rate"] > 1000
        assert 0 < row["first_batch_s"] < 20
        assert 50 < row["private_mb"] < 2000
    assert rows["small", "packed", 1]["bytes_per_cell"] < rows["fast", "packed", 1]["bytes_per_cell"]
    assert rows["small", "packed", 1]["types"] == pytest.approx(result["random_types"]["256"], rel=0.03)
    assert any("Writing the atlas" in line for line in said)
    console = Console(width=160, record=True)
    show(result, console)
    assert "bgen small" in console.export_text()
    said.clear()
    bench_loader(tmp_path / "again", **{**settings, "repetitions": 1}, say=said.append)
    assert not any("Writing the atlas" in line for line in said)  # it is kept


@pytest.mark.parametrize("form", ["packed", "csr", "dense", "trajectories"])
def test_a_job_is_measured(form: str, atlas: Atlas, folder: Path) -> None:
    job = Job("bgen", str(folder / "small"), 256, form, 1, 0.1, str(folder / "types.npy"))
    found = measure(job)
    assert found["cpu_rate"] > 1000
    assert found["wall_rate"] > 1000
    assert 0 < found["first_batch_s"] < 30
    assert 50 < found["private_mb"] < 4000
    if form == "trajectories":  # of one batch of the atlas, which has fewer types than all
        assert 1 < found["types"] < 1.1 * _random_types(atlas, 256)
    else:
        assert found["types"] == pytest.approx(_random_types(atlas, 256), rel=0.1)
    assert not [thread for thread in threading.enumerate() if thread.name == "bgen-loader"]


def test_cases_are_measured_once() -> None:
    found = cases(["annbatch", "cellstream", "scdl"], [1024, 4096], 1)
    assert len(set(found)) == len(found)
    assert Case("annbatch", "annbatch", 4096, "csr") in found
    assert Case("annbatch", "annbatch", 4096, "dense") not in found
    assert Case("scdl", "scdl", 4096, "csr") not in found


def test_ratios_compare_the_same_batch_and_form() -> None:
    def row(loader: str, batch: int, form: str, rate: float) -> dict[str, object]:
        return {"loader": loader, "batch": batch, "form": form, "threads": 1, "cpu_rate": rate, "wall_rate": rate}

    rows = [
        row("bgen", 1024, "packed", 8.0),
        row("bgen", 1024, "dense", 9.0),
        row("bgen", 4096, "packed", 10.0),
        row("annbatch", 1024, "csr", 2.0),
        row("annbatch", 1024, "dense", 3.0),
    ]
    packed, dense, large, *_ = _with_ratios(rows)
    assert packed["cpu_over_annbatch"] == 4.0
    assert dense["cpu_over_annbatch"] == 3.0
    assert "cpu_over_annbatch" not in large
    assert "cpu_over_cellstream" not in packed


def test_trajectories_are_compared_with_the_same_store() -> None:
    def row(path: str, form: str, rate: float, threads: int = 1) -> dict[str, Any]:
        of = {"loader": "bgen", "path": path, "batch": 1024, "form": form, "threads": threads}
        return of | {"cpu_rate": rate, "wall_rate": rate}

    rows = [row("small", "csr", 9.0), row("fast", "csr", 12.0), row("fast", "packed", 20.0)]
    *others, found = _with_ratios([*rows, row("fast", "trajectories", 4.0)])
    assert found["cpu_per_cell_over_csr"] == 3.0
    assert not any("cpu_per_cell_over_csr" in other for other in others)
    assert Case("bgen", "fast", 1024, "trajectories") in cases([], [1024, 4096], 2)


def test_peers_that_cannot_be_measured_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no loader 'anbatch'.*annbatch"):
        bench_loader(tmp_path, peers=["anbatch"])
    with pytest.raises(UserError, match=r"does not have annbatch: install annbatch zarrs torch there"):
        bench_loader(tmp_path, peers=["annbatch"])
