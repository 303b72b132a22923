"""Files as they lie in public archives: older layouts, prefixes, headers, several modalities, AnnData in memory."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from bgen.errors import UserError
from bgen.store.store import Store
from data_tools.building.build import build
from data_tools.check.check import CheckOptions, check
from data_tools.inputs.registry import open_source
from data_tools.inputs.source import Source


@pytest.fixture
def counts() -> sp.csr_matrix:
    return sp.csr_matrix(np.random.default_rng(0).poisson(1.0, (25, 7)).astype(np.float32))


def together(source: Source, matrix: str = "X") -> sp.csr_matrix:
    return sp.vstack([block for _, block in source.iterate(matrix, 4)], format="csr")


def write_mtx(
    folder: Path, counts: sp.spmatrix, prefix: str = "", *, headers: bool = False, zipped: bool = False
) -> None:
    folder.mkdir(exist_ok=True)
    n_cells, n_genes = 25, 7
    features = [f"ENSG{i:011d}\tNAME{i}" for i in range(n_genes)]
    barcodes = [f"AC{i}-1" for i in range(n_cells)]
    if headers:
        features, barcodes = ["gene_id\tgene_name", *features], ["barcode", *barcodes]
    scipy.io.mmwrite(folder / f"{prefix}matrix.mtx", sp.coo_matrix(counts).astype(np.int64))
    (folder / f"{prefix}features.tsv").write_text("\n".join(features) + "\n")
    (folder / f"{prefix}barcodes.tsv").write_text("\n".join(barcodes) + "\n")
    if zipped:
        for file in [one for one in folder.iterdir() if one.name.startswith(prefix)]:
            file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()


def check_mtx(source: Source, counts: sp.csr_matrix) -> None:
    assert source.obs.index[0] == "AC0-1"
    assert source.var().index[0] == "ENSG00000000000"
    assert list(source.var()["symbol"])[-1] == "NAME6"
    assert (together(source) != counts).nnz == 0
    assert (counts != source.read().X).nnz == 0


@pytest.mark.parametrize("zipped", [True, False])
def test_a_prefix_before_the_files_of_a_10x_folder(zipped: bool, counts: sp.csr_matrix, tmp_path: Path) -> None:
    write_mtx(tmp_path / "one", counts.T, "GSM12_liver_", zipped=zipped)
    source = open_source(tmp_path / "one")
    check_mtx(source, counts)
    assert "GSM12_liver_" in source.notes[0]
    write_mtx(tmp_path / "one", counts.T, "GSM13_lung_", zipped=zipped)
    with pytest.raises(UserError, match=r"several samples \(GSM12_liver_matrix.mtx.*GSM13_lung_matrix.mtx"):
        open_source(tmp_path / "one")
    check_mtx(open_source(tmp_path / "one" / f"GSM13_lung_matrix.mtx{'.gz' if zipped else ''}"), counts)


def test_header_lines_and_a_matrix_of_cells_by_genes(counts: sp.csr_matrix, tmp_path: Path) -> None:
    write_mtx(tmp_path / "a", counts.T, headers=True)
    source = open_source(tmp_path / "a")
    check_mtx(source, counts)
    assert any("gene_id, gene_name" in note for note in source.notes)
    write_mtx(tmp_path / "b", counts, headers=True)
    source = open_source(tmp_path / "b")
    check_mtx(source, counts)
    assert any("cells x genes" in note for note in source.notes)
    report = check([tmp_path / "b"], CheckOptions(organism="human"))
    assert not report.errors
    assert any("cells x genes" in finding.message for finding in report.findings)
    write_mtx(tmp_path / "c", counts[:24].T)
    with pytest.raises(UserError, match=r"7 x 24.*25 cells and 7 genes"):
        open_source(tmp_path / "c")


def write_before_07(path: Path, counts: sp.csr_matrix) -> None:
    """Write as anndata did before 0.7: compound arrays, codes with categories in uns, raw.X beside X."""
    n_cells, n_genes = counts.shape
    obs = np.zeros(n_cells, dtype=[("index", "S8"), ("cell_type", "i1"), ("score", "f8")])
    obs["index"] = [f"cell{i}" for i in range(n_cells)]
    obs["cell_type"] = np.arange(n_cells) % 2
    var = np.zeros(n_genes, dtype=[("index", "S8")])
    var["index"] = [f"GENE{i}A" for i in range(n_genes)]
    with h5py.File(path, "w") as file:
        file["obs"], file["var"], file["raw.var"] = obs, var, var
        file["uns/cell_type_categories"] = np.array([b"B", b"T"])
        for name, matrix in (("X", counts.log1p()), ("raw.X", counts)):
            group = file.create_group(name)
            group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr
            group.attrs["h5sparse_format"] = "csr"
            group.attrs["h5sparse_shape"] = np.array(matrix.shape)


def test_files_of_before_anndata_07_are_read_as_anndata_reads_them(counts: sp.csr_matrix, tmp_path: Path) -> None:
    write_before_07(tmp_path / "old.h5ad", counts)
    source = open_source(tmp_path / "old.h5ad")
    assert source.kind == "h5ad"
    assert list(source.obs.index[:2]) == ["cell0", "cell1"]
    assert list(source.obs["cell_type"][:3]) == ["B", "T", "B"]
    assert list(source.var().index[:2]) == ["GENE0A", "GENE1A"]
    assert (together(source, "raw/X") != counts).nnz == 0
    found = check([tmp_path / "old.h5ad"], CheckOptions(organism="human")).errors
    assert ["rerun with --counts raw/X" in finding.message for finding in found] == [True]
    report = check([tmp_path / "old.h5ad"], CheckOptions(organism="human", counts="auto"))
    assert not report.errors
    assert report.files[0].matrix == "raw/X"
    build(report, tmp_path / "store", created_by="test")
    assert Store(tmp_path / "store").manifest.n_cells == 25


def test_of_several_modalities_rna_is_read(counts: sp.csr_matrix, tmp_path: Path) -> None:
    adata = anndata.AnnData(counts, var=pd.DataFrame(index=[f"GENE{i}A" for i in range(7)]))
    for modalities in (("rna", "prot"), ("atac", "prot")):
        with h5py.File(tmp_path / f"{modalities[0]}.h5mu", "w") as file:
            group = file.create_group("mod")
            for name in modalities:
                anndata.io.write_elem(group, name, adata)
            anndata.io.write_elem(file, "obs", pd.DataFrame(index=adata.obs_names))
            anndata.io.write_elem(file, "var", pd.DataFrame(index=adata.var_names))
    source = open_source(tmp_path / "rna.h5mu")
    assert source.kind == "h5mu"
    assert (together(source) != counts).nnz == 0
    assert (counts != source.read().X).nnz == 0
    assert "prot" in source.notes[0]
    with pytest.raises(UserError, match="modalities atac, prot"):
        open_source(tmp_path / "atac.h5mu")


def test_one_genome_for_all_genes_of_a_10x_h5(counts: sp.csr_matrix, tmp_path: Path) -> None:
    by_cell = counts.astype(np.int32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file.create_group("matrix")
        group["data"], group["indices"], group["indptr"] = by_cell.data, by_cell.indices, by_cell.indptr
        group["shape"] = np.array(counts.shape[::-1])
        group["barcodes"] = np.array([f"AC{i}" for i in range(25)], dtype="S")
        group["features/id"] = np.array([f"ENSG{i:011d}" for i in range(7)], dtype="S")
        group["features/name"] = np.array([f"NAME{i}" for i in range(7)], dtype="S")
        group["features/genome"] = np.bytes_("GRCh38")
    source = open_source(tmp_path / "a.h5")
    assert set(source.var()["genome"]) == {"GRCh38"}
    assert (counts != source.read().X).nnz == 0
    assert source.read().var["symbol"].iloc[0] == "NAME0"


@pytest.mark.parametrize("layout", ["csr", "csc", "dense", "view", "backed", "dask"])
def test_anndata_in_memory_is_an_input(layout: str, counts: sp.csr_matrix, tmp_path: Path) -> None:
    var = pd.DataFrame(index=[f"GENE{i}A" for i in range(7)])
    obs = pd.DataFrame({"cell_type": ["B", "T"] * 12 + ["B"]}, index=[f"c{i}" for i in range(25)])
    adata = anndata.AnnData(counts.copy(), obs=obs, var=var, uns={"organism": "human"})
    adata.layers["twice"] = counts * 2
    if layout == "csc":
        adata.X = adata.X.tocsc()
    elif layout == "dense":
        adata.X = adata.X.toarray()
    elif layout == "view":
        adata = anndata.concat([adata, adata], index_unique="-", merge="first", uns_merge="first")[:25]
    elif layout == "backed":
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    elif layout == "dask":
        import dask.array as da

        adata.X = da.from_array(adata.X.toarray(), chunks=(6, 7))
    source = open_source(adata)
    assert (together(source) != counts).nnz == 0
    assert (together(source, "twice") != counts * 2).nnz == 0
    assert list(source.matrices) == ["X", "layers/twice"]
    report = check([adata], CheckOptions(organism="human"))
    assert not report.errors
    build(report, tmp_path / "store", created_by="test", seed=3)
    from_file = tmp_path / "same.h5ad"
    anndata.AnnData(counts, obs=obs, var=var, uns={"organism": "human"}).write_h5ad(from_file)
    build(check([from_file], CheckOptions(organism="human")), tmp_path / "other", created_by="test", seed=3)
    made = [list(Store(tmp_path / name).manifest.files) for name in ("store", "other")]
    assert made[0] == made[1]


def test_a_matrix_out_of_order_in_memory_is_left_as_it_is(counts: sp.csr_matrix) -> None:
    reversed_rows = sp.csr_matrix((counts.data[::-1].copy(), counts.indices[::-1].copy(), counts.indptr), counts.shape)
    reversed_rows.indptr = np.concatenate([[0], np.cumsum(np.diff(counts.indptr)[::-1])]).astype(np.int32)
    before = reversed_rows.indices.copy()
    assert not reversed_rows.has_sorted_indices
    source = open_source(anndata.AnnData(reversed_rows))
    assert (together(source) != counts[::-1]).nnz == 0
    list(source.iterate("X"))
    assert np.array_equal(source.read().X.indices, before)


def test_counts_may_lie_elsewhere_in_each_file(counts: sp.csr_matrix, tmp_path: Path) -> None:
    var = pd.DataFrame(index=[f"GENE{i}A" for i in range(7)])
    first = anndata.AnnData(counts, var=var)
    second = anndata.AnnData(counts.log1p(), var=var, layers={"counts": counts * 2})
    paths = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    for adata, path in zip((first, second), paths, strict=True):
        adata.write_h5ad(path)
    for wanted in ("X", "layers/counts"):
        assert check(paths, CheckOptions(organism="human", counts=wanted)).errors
    report = check(paths, CheckOptions(organism="human", counts="auto"))
    assert not report.errors
    assert [file.matrix for file in report.files] == ["X", "layers/counts"]


def test_parts_of_the_molecules_are_not_taken_for_all_of_them(counts: sp.csr_matrix, tmp_path: Path) -> None:
    layers = dict.fromkeys(("ambiguous", "spliced", "unspliced"), counts)
    adata = anndata.AnnData(counts.log1p(), var=pd.DataFrame(index=[f"GENE{i}A" for i in range(7)]), layers=layers)
    adata.write_h5ad(tmp_path / "a.h5ad")
    for wanted in (None, "auto"):
        (found,) = check([tmp_path / "a.h5ad"], CheckOptions(organism="human", counts=wanted)).errors
        assert "adata.layers['spliced'] + adata.layers['unspliced'] + adata.layers['ambiguous']" in found.message
        assert "--counts layers/ambiguous" not in found.message
        assert found.message.endswith("--counts layers/spliced")
    assert not check([tmp_path / "a.h5ad"], CheckOptions(organism="human", counts="layers/spliced")).errors


def test_genes_are_compared_with_a_reference(bgen: Any, counts: sp.csr_matrix, tmp_path: Path) -> None:
    adata = anndata.AnnData(counts, var=pd.DataFrame(index=[f"GENE{i}A" for i in range(7)]))
    adata.write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "genes.csv").write_text("id,symbol\n" + "".join(f"ENSG{i:011d},GENE{i}A\n" for i in range(5, 15)))
    options = CheckOptions(organism="human", reference=tmp_path / "genes.csv")
    report = check([tmp_path / "a.h5ad"], options)
    assert any("20% of the 10 genes" in finding.message for finding in report.findings)  # matched by their symbols
    build(report, tmp_path / "store", created_by="test", reference=options.reference)
    assert Store(tmp_path / "store").manifest.n_nonzeros == counts[:, 5:].nnz
    arguments = ("data", "check", tmp_path / "a.h5ad", "--organism", "human", "--floor", "0.5")
    refused = bgen(*arguments, "--reference", tmp_path / "genes.csv")
    assert refused.code == 2
    half = check([tmp_path / "a.h5ad"], replace(options, floor=0.5))
    assert any("at least 50% are needed; --floor lowers that" in finding.message for finding in half.findings)
    alone = bgen(*arguments)
    assert (alone.code, "--reference" in alone.err) == (2, True)
