"""Files are opened lazily, whatever their layout, and what cannot be opened is said clearly."""

from __future__ import annotations

import gc
import gzip
import pickle
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from bgen.errors import UserError
from data_tools.inputs.registry import open_source
from data_tools.inputs.source import Source, require_names


@pytest.fixture
def counts() -> sp.csr_matrix:
    rng = np.random.default_rng(0)
    return sp.csr_matrix(rng.poisson(0.4, (53, 17)).astype(np.float32))


def _frames(shape: tuple[int, int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    obs = pd.DataFrame({"cell_type": pd.Categorical(["a", "b"] * (shape[0] // 2) + ["a"] * (shape[0] % 2))})
    obs.index = pd.Index([f"cell{i}" for i in range(shape[0])])
    return obs, pd.DataFrame({"symbol": [f"S{i}" for i in range(shape[1])]}, index=[f"id{i}" for i in range(shape[1])])


def _together(source: Source, matrix: str = "X", rows: int | None = 7) -> sp.csr_matrix:
    starts, blocks = zip(*source.iterate(matrix, rows), strict=True)
    if rows:
        assert list(starts) == list(range(0, source.n_cells, rows))
    assert all(block.has_sorted_indices for block in blocks)
    return sp.vstack(blocks, format="csr")


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_h5ad_layouts(layout: str, counts: sp.csr_matrix, tmp_path: Path) -> None:
    stored = {"csr": counts, "csc": counts.tocsc(), "dense": counts.toarray()}[layout]
    obs, var = _frames(counts.shape)
    raw = anndata.AnnData(
        sp.hstack([counts, counts]).tocsr(), obs=obs, var=pd.DataFrame(index=[f"r{i}" for i in range(34)])
    )
    adata = anndata.AnnData(stored, obs=obs, var=var, uns={"organism": "synthetic", "nested": {"a": np.ones(2)}})
    adata.raw = raw
    adata.layers["counts"] = stored.astype(np.int32)
    adata.write_h5ad(tmp_path / "a.h5ad")
    source = open_source(tmp_path / "a.h5ad")
    assert list(source.matrices) == ["X", "raw/X", "layers/counts"]
    assert source.matrices["X"].layout == layout
    assert source.uns == {"organism": "synthetic"}
    assert list(source.obs["cell_type"].cat.categories) == ["a", "b"]
    assert list(source.var("raw.X").index[:2]) == ["r0", "r1"]
    whole = _together(source)
    assert whole.dtype == np.float32
    assert (whole != counts).nnz == 0
    assert _together(source, "counts").dtype == np.int32
    assert _together(source, "raw").shape == (53, 34)
    assert (_together(source, rows=None) != counts).nnz == 0
    first, block = next(source.iterate("X", 100, start=10, stop=20))
    assert first == 10
    assert (block != counts[10:20]).nnz == 0
    assert (_together(pickle.loads(pickle.dumps(source))) != counts).nnz == 0


def test_nan_in_a_dense_matrix_is_not_lost(tmp_path: Path) -> None:
    values = np.zeros((4, 3), np.float32)
    values[2, 1] = np.nan
    anndata.AnnData(values).write_h5ad(tmp_path / "a.h5ad")
    assert np.isnan(_together(open_source(tmp_path / "a.h5ad")).data).sum() == 1


def _write_10x_h5(path: Path, counts: sp.csr_matrix, version: int) -> None:
    by_cell = counts.astype(np.int32)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        group["data"], group["indices"], group["indptr"] = (
            by_cell.data,
            by_cell.indices,
            by_cell.indptr.astype(np.int64),
        )
        group["shape"] = np.array(counts.shape[::-1])
        group["barcodes"] = np.array([f"AC{i}-1" for i in range(counts.shape[0])], dtype="S")
        ids = np.array([f"ENSG{i:011d}" for i in range(counts.shape[1])], dtype="S")
        names = np.array([f"NAME{i}" for i in range(counts.shape[1])], dtype="S")
        if version == 3:
            group["features/id"], group["features/name"] = ids, names
            group["features/feature_type"] = np.array(
                ["Gene Expression"] * (len(ids) - 1) + ["Antibody Capture"], dtype="S"
            )
            group["features/genome"] = np.array(["GRCh38"] * len(ids), dtype="S")
        else:
            group["genes"], group["gene_names"] = ids, names


@pytest.mark.parametrize("version", [2, 3])
def test_10x_h5(version: int, counts: sp.csr_matrix, tmp_path: Path) -> None:
    _write_10x_h5(tmp_path / "filtered.h5", counts, version)
    source = open_source(tmp_path / "filtered.h5")
    assert source.kind == "10x h5"
    assert source.obs.index[1] == "AC1-1"
    assert source.var().index[3] == "ENSG00000000003"
    assert source.var()["symbol"].iloc[3] == "NAME3"
    assert (_together(source) != counts).nnz == 0


@pytest.mark.parametrize(("zipped", "names"), [(True, "features.tsv"), (False, "genes.tsv")])
def test_10x_folder(zipped: bool, names: str, counts: sp.csr_matrix, tmp_path: Path) -> None:
    n_cells, n_genes = counts.shape
    scipy.io.mmwrite(tmp_path / "matrix.mtx", counts.T.tocoo().astype(np.int64))
    lines = [f"ENSG{i:011d}\tNAME{i}" + ("\tGene Expression" if zipped else "") for i in range(n_genes)]
    (tmp_path / names).write_text("\n".join(lines) + "\n")
    (tmp_path / "barcodes.tsv").write_text("".join(f"AC{i}-1\n" for i in range(n_cells)))
    if zipped:
        for file in list(tmp_path.iterdir()):
            (tmp_path / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    source = open_source(tmp_path)
    assert source.kind == "10x mtx"
    assert source.matrices["X"].dtype == np.int64
    assert source.var()["symbol"].iloc[2] == "NAME2"
    assert ("feature_type" in source.var()) == zipped
    assert (_together(source) != counts).nnz == 0


def test_what_cannot_be_opened_is_said(counts: sp.csr_matrix, tmp_path: Path) -> None:
    obs, var = _frames(counts.shape)
    good = tmp_path / "cells.h5ad"
    anndata.AnnData(counts, obs=obs, var=var).write_h5ad(good)

    with pytest.raises(UserError, match=r"no such file. Did you mean 'cells.h5ad'"):
        open_source(tmp_path / "cell.h5ad")
    with pytest.raises(UserError, match=r"no matrix 'lognorm'. There are: X"):
        next(open_source(good).iterate("lognorm"))
    text = tmp_path / "text.h5ad"
    text.write_text("barcode,gene\n")
    with pytest.raises(UserError, match=r"not an .h5ad"):
        open_source(text)
    (tmp_path / "nothing.h5ad").touch()
    with pytest.raises(UserError, match="empty"):
        open_source(tmp_path / "nothing.h5ad")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["images"] = np.ones(3)
    with pytest.raises(UserError, match=r"not a 10x .h5.*images"):
        open_source(tmp_path / "other.h5")
    cut = tmp_path / "cut.h5ad"
    cut.write_bytes(good.read_bytes()[:5000])
    with pytest.raises(UserError, match="cut off"):
        open_source(cut)
    anndata.AnnData(sp.csr_matrix((0, 17), dtype=np.float32), var=var).write_h5ad(tmp_path / "none.h5ad")
    with pytest.raises(UserError, match="is empty"):
        open_source(tmp_path / "none.h5ad")
    anndata.AnnData(obs=obs, var=var).write_h5ad(tmp_path / "nomatrix.h5ad")
    with pytest.raises(UserError, match="no matrix"):
        open_source(tmp_path / "nomatrix.h5ad")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"matrix.mtx"):
        open_source(tmp_path / "folder")


def test_damage_in_the_middle_is_said(tmp_path: Path) -> None:
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(1.0, (400, 100)).astype(np.float32))
    path = tmp_path / "a.h5ad"
    anndata.AnnData(counts).write_h5ad(path, compression="gzip")
    with h5py.File(path, "r") as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset : chunk.byte_offset + 200] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read"):
        list(open_source(path).iterate())


def test_names_that_were_looked_at_are_not_kept(tmp_path: Path) -> None:
    """Not even until cycles are collected: of very many cells that is a hundred bytes of each."""
    names = [f"one of 337 names {i}" for i in range(337)]
    gc.collect()
    gc.disable()
    try:
        require_names(tmp_path)(pd.Index(names))
        kept = [
            1 for one in gc.get_objects() if issubclass(type(one), pd.Index) and len(one) == 337 and one[0] == names[0]
        ]
    finally:
        gc.enable()
    assert not kept
    with pytest.raises(UserError, match=r"a.*b' holds a NUL|NUL character"):
        require_names(tmp_path)(pd.Index([*names, "a\0b"]))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("cells.loom", "anndata.io.read_loom"),
        ("cells.rds", "zellkonverter::writeH5AD"),
        ("cells.RDS.gz", "zellkonverter::writeH5AD"),
        ("cells.h5seurat", "SeuratDisk::Convert"),
        ("counts.csv.gz", "anndata.io.read_csv"),
        ("counts.tsv", "anndata.io.read_text"),
    ],
)
def test_of_formats_that_are_not_read_the_way_to_one_that_is_is_told(tmp_path: Path, name: str, told: str) -> None:
    with h5py.File(tmp_path / name, "w") as file:
        file["matrix"] = np.ones(3)
    with pytest.raises(UserError, match=f"does not read this format; .*{told}") as raised:
        open_source(tmp_path / name)
    assert "\n" not in str(raised.value)
    if told.startswith("anndata"):
        assert hasattr(anndata.io, told.removeprefix("anndata.io."))
