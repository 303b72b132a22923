"""AnnData in zarr is read like .h5ad, in every version and layout, and a collection is its members."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from bgen.errors import UserError
from bgen.store.store import Store
from data_tools.building.build import build
from data_tools.check.check import CheckOptions, check
from data_tools.export.to_anndata import to_anndata
from data_tools.inputs import source as inputs
from data_tools.inputs.registry import open_source


def make_adata(n_cells: int = 83, seed: int = 0, layout: str = "csr") -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    counts = sp.csr_matrix(rng.poisson(0.4, (n_cells, 40)).astype(np.float32) + np.eye(n_cells, 40, dtype=np.float32))
    stored = {"csr": counts, "csc": counts.tocsc(), "dense": counts.toarray()}[layout]
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(rng.choice(["a", "b"], n_cells)), "time": rng.choice([0.0, 2.5], n_cells)},
        index=[f"cell{seed}-{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame({"symbol": [f"S{i}" for i in range(40)]}, index=[f"GENE{i:05d}" for i in range(40)])
    return anndata.AnnData(stored, obs=obs, var=var, uns={"organism": "synthetic", "time_unit": "hours"})


def write_zarr(adata: anndata.AnnData, path: Path, version: int = 3) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what will be the default, and that consolidated metadata are not yet standard
        anndata.io.write_elem(zarr.open_group(path, mode="w", zarr_format=version), "/", adata)  # type: ignore[arg-type]
        zarr.consolidate_metadata(path)
    return path


def shard(path: Path, name: str = "X") -> None:
    """Write the arrays of a sparse matrix again, sharded, as annbatch does."""
    group = zarr.open_group(path, mode="a")[name]
    for part in ("data", "indices"):
        values = group[part][:]
        del group[part]
        group.create_array(part, data=values, chunks=(64,), shards=(640,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that consolidated metadata are not in the standard yet
        zarr.consolidate_metadata(path)


@pytest.mark.parametrize(
    ("layout", "version"),
    [
        *(("csr", 2), ("csc", 3)),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in (("csr", 3), ("csc", 2), ("dense", 2))),
        ("dense", 3),
    ],
)
def test_versions_and_layouts(version: int, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "CSC_VALUES", 300)
    adata = make_adata(layout=layout)
    adata.layers["counts"] = adata.X.astype(np.int32)
    source = open_source(write_zarr(adata, tmp_path / "a.zarr", version))
    assert source.kind == "anndata zarr"
    assert list(source.matrices) == ["X", "layers/counts"]
    assert source.matrices["X"].layout == layout
    assert source.uns == {"organism": "synthetic", "time_unit": "hours"}
    assert source.obs["cell_type"].tolist() == adata.obs["cell_type"].tolist()
    assert source.var()["symbol"].iloc[3] == "S3"
    for one in (source, pickle.loads(pickle.dumps(source))):
        starts, blocks = zip(*one.iterate("X", 9), strict=True)
        assert list(starts) == list(range(0, 83, 9)) or layout == "csc"  # of which a pass need not end with a block
        assert (sp.vstack(blocks) != sp.csr_matrix(adata.X)).nnz == 0
    assert next(iter(source.iterate("counts")))[1].dtype == np.int32


def test_a_collection_is_its_members_and_builds_like_h5ad(tmp_path: Path) -> None:
    parts = {number: make_adata(60 + number, number) for number in (0, 2, 10)}  # of which names sort otherwise
    zarr.open_group(tmp_path / "collection", mode="w")
    for number, part in parts.items():
        part.write_h5ad(tmp_path / f"{number:02d}.h5ad")
        shard(write_zarr(part, tmp_path / f"collection/dataset_{number}"))
    report = check([tmp_path / "collection"])
    assert [file.path.name for file in report.files] == [f"dataset_{number}" for number in parts]
    build(report, tmp_path / "a", created_by="test")
    build(check([tmp_path / f"{number:02d}.h5ad" for number in parts]), tmp_path / "b", created_by="test")
    a, b = Store(tmp_path / "a"), Store(tmp_path / "b")
    streams = [name for name in a.manifest.files if name.startswith(("gaps", "counts", "rows", "origin", "obs"))]
    assert all(a.manifest.files[name] == b.manifest.files[name] for name in streams)
    assert a.manifest.sources[2].kind == "anndata zarr"


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    path = write_zarr(make_adata(), tmp_path / "a.zarr")
    (path / "X/indices/c/0").unlink()  # zarr itself would take it for zeros
    with pytest.raises(UserError, match="'indices' are missing, the first is c/0"):
        open_source(path)
    zarr.open_group(tmp_path / "empty.zarr", mode="w")
    with pytest.raises(UserError, match="not AnnData"):
        open_source(tmp_path / "empty.zarr")
    path = write_zarr(make_adata(), tmp_path / "b.zarr")
    chunk = next(file for file in (path / "X/data/c").rglob("*") if file.is_file())
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(UserError, match="'X' cannot be read"):
        list(open_source(path).iterate())


@pytest.mark.parametrize("ending", [pytest.param("h5ad", marks=pytest.mark.slow), "zarr"])
def test_there_and_back(ending: str, tmp_path: Path) -> None:
    adata = make_adata(700)
    x = sp.lil_matrix(adata.X)
    x[5, 7], x[600, 3], x[5, 8] = 300, 2_000_000, 255
    adata.X = sp.csr_matrix(x)
    adata.write_h5ad(tmp_path / "in.h5ad")
    build(check([tmp_path / "in.h5ad"]), tmp_path / "store", created_by="test", split_by=None)
    store = Store(tmp_path / "store")
    steps: list[tuple[int, int]] = []
    out = tmp_path / f"out.{ending}"
    assert to_anndata(store, out, progress=lambda *step: steps.append(step)) == 700
    assert steps[-1] == (700, 700)
    back = anndata.read_h5ad(out) if ending == "h5ad" else anndata.read_zarr(out)
    assert back.X.dtype == np.float32
    back = back[adata.obs_names, adata.var_names]
    assert (sp.csr_matrix(back.X) != adata.X).nnz == 0
    assert back.obs["cell_type"].tolist() == adata.obs["cell_type"].tolist()
    assert back.obs["time"].tolist() == adata.obs["time"].tolist()
    assert back.var["symbol"].tolist() == adata.var["symbol"].tolist()
    assert back.obs["split"].value_counts()["train"] == 560
    # what comes out goes in again, with the same roles and units
    again = check([out])
    assert not again.errors
    assert (again.roles.time, again.roles.time_unit, again.organism) == ("time", "hours", "synthetic")

    part = tmp_path / f"test.{ending}"
    assert to_anndata(store, part, split="test", dtype="uint32") == 70
    read = anndata.read_h5ad(part) if ending == "h5ad" else anndata.read_zarr(part)
    assert read.X.dtype == np.uint32
    assert (sp.csr_matrix(read.X).astype(np.float32) != adata[read.obs_names, read.var_names].X).nnz == 0
    with pytest.raises(UserError, match="there already"):
        to_anndata(store, part)


def test_counts_that_float32_does_not_hold_are_not_rounded(tmp_path: Path) -> None:
    adata = make_adata(50)
    x = sp.lil_matrix(adata.X).astype(np.int64)
    x[3, 3] = 2**24 + 1
    adata.X = sp.csr_matrix(x)
    adata.write_h5ad(tmp_path / "in.h5ad")
    build(check([tmp_path / "in.h5ad"], CheckOptions()), tmp_path / "store", created_by="test")
    with pytest.raises(UserError, match="16,777,217 is not exact"):
        to_anndata(Store(tmp_path / "store"), tmp_path / "out.h5ad")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5ad", "store"]
    to_anndata(Store(tmp_path / "store"), tmp_path / "out.h5ad", dtype="uint32")
    assert anndata.read_h5ad(tmp_path / "out.h5ad").X.max() == 2**24 + 1
