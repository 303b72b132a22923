"""Each check finds what it is for, names the fix, and keeps silent about good files."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from rich.console import Console

from bgen.order import groups
from bgen.store.store import Store
from data_tools.building.build import build
from data_tools.check import check as checks
from data_tools.check.check import CheckOptions, check
from data_tools.check.counts import duplicate_groups
from data_tools.check.findings import Finding, Report, Roles
from data_tools.export.to_anndata import to_anndata
from data_tools.simulate.simulate import simulate


@pytest.fixture
def adata() -> anndata.AnnData:
    """Good cells: 300 x 80 human genes with names that no guess has to be made about."""
    cells = simulate("tiny", cells=300, genes=80, seed=1)
    genes = pd.DataFrame({"symbol": [f"NAME{i}" for i in range(80)]}, index=[f"ENSG{i:011d}" for i in range(80)])
    labels = cells.obs[["cell_type", "batch", "donor"]]
    return anndata.AnnData(cells.X.copy(), obs=labels.copy(), var=genes, uns={"organism": "human"})


class Checker:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0

    def __call__(self, *files: anndata.AnnData, **options: Any) -> Report:
        paths = []
        for adata in files:
            self.number += 1
            paths.append(self.folder / f"file{self.number}.h5ad")
            adata.write_h5ad(paths[-1])
        return check(paths, CheckOptions(**options))


@pytest.fixture
def checker(tmp_path: Path) -> Checker:
    return Checker(tmp_path)


def only(report: Report, id: str, level: str) -> Finding:
    """The one finding of a check at a level; and no other errors."""
    found = [f for f in report.findings if f.id == id and f.level == level]
    assert len(found) == 1, report.findings
    assert level == "error" or not report.errors
    return found[0]


def _log1p(adata: anndata.AnnData) -> sp.csr_matrix:
    totals = np.asarray(adata.X.sum(1)).ravel()
    return sp.csr_matrix(sp.diags(1e4 / totals) @ adata.X).log1p().astype(np.float32)


def test_a_simulated_file_is_good_and_its_columns_are_found(tmp_path: Path) -> None:
    cells = simulate("tiny")
    cells.write_h5ad(tmp_path / "a.h5ad")
    report = check([tmp_path / "a.h5ad"])
    assert [f for f in report.findings if f.level in ("error", "warning", "fix")] == []
    assert report.organism == "synthetic"
    assert report.roles.columns() == {
        "cell_type": "cell_type", "batch": "batch", "donor": "donor", "perturbation": "perturbation",
        "time": "time", "dose": "dose", "drug": "condition",
    }  # fmt: skip
    assert (report.roles.control, report.roles.time_unit, report.roles.dose_unit) == ("control", "hours", "uM")
    file = report.files[0]
    assert (file.matrix, file.rounding) == ("X", "none")
    assert file.keep.all()
    assert np.array_equal(file.gene_map, np.arange(cells.n_vars))
    assert np.array_equal(file.library, np.asarray(cells.X.sum(1)).ravel())
    assert np.array_equal(report.gene_cells, cells.X.getnnz(0))
    assert list(report.genes.index) == list(cells.var_names)
    assert list(report.genes["symbol"]) == list(cells.var["symbol"])


def test_log_normalised_is_refused_and_the_counts_are_found(adata: anndata.AnnData, checker: Checker) -> None:
    adata.layers["spliced"] = adata.X.copy()
    adata.layers["counts"] = adata.X.copy()
    adata.layers["em"] = adata.X * 0.37
    adata.X = _log1p(adata)
    message = only(checker(adata), "C01", "error").message
    assert "X is not counts: 100% of the non-zero values are fractional, max " in message
    assert "log1p-normalised (row sums of expm1 = 10,000)" in message
    assert "Counts found in layers/counts and layers/spliced: rerun with --counts layers/counts" in message
    report = checker(adata, counts="layers/counts")
    assert not report.errors
    assert report.files[0].matrix == "layers/counts"
    wrong = checker(adata, counts="layers/count")
    assert "Did you mean 'layers/counts'" in only(wrong, "C01", "error").message


def test_counts_in_raw_are_found(adata: anndata.AnnData, checker: Checker) -> None:
    adata.raw = adata.copy()
    adata = adata[:, :40].copy()
    adata.X = _log1p(adata)
    assert "rerun with --counts raw/X" in only(checker(adata), "C01", "error").message
    report = checker(adata, counts="raw/X")
    assert not report.errors
    assert len(report.genes) == 80


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.log1p(), "It looks log-transformed. The file holds no other matrix"),
        (lambda x: sp.diags(1e6 / np.asarray(x.sum(1)).ravel()) @ x, "normalised to a fixed total (row sums = 1e+06)"),
    ],
)
def test_other_transformations_are_named(change: Any, words: str, adata: anndata.AnnData, checker: Checker) -> None:
    adata.X = sp.csr_matrix(change(adata.X)).astype(np.float32)
    assert words in only(checker(adata), "C01", "error").message


def test_noise_around_integers_is_rounded(adata: anndata.AnnData, checker: Checker) -> None:
    adata.X = adata.X.astype(np.float64)
    adata.X.data[::3] += 1e-11
    report = checker(adata)
    assert "differ from integers by at most 1e-11" in only(report, "C02", "fix").message
    assert report.files[0].rounding == "nearest"


@pytest.mark.parametrize(
    ("value", "words"), [(-3.0, "1 negative"), (np.nan, "1 NaN or infinite"), (np.inf, "infinite")]
)
def test_negative_and_not_finite_name_the_cell(
    value: float, words: str, adata: anndata.AnnData, checker: Checker
) -> None:
    adata.X = adata.X.toarray()
    adata.X[7, 5] = value
    message = only(checker(adata), "C03", "error").message
    assert words in message
    assert f"cell {adata.obs_names[7]}, gene ENSG00000000005" in message


def test_scaled_is_named(adata: anndata.AnnData, checker: Checker) -> None:
    dense = adata.X.toarray()
    adata.X = (dense - dense.mean(0)) / dense.std(0)
    assert "X is scaled" in only(checker(adata), "C04", "error").message


def test_binarised_and_clipped_are_warned_of(adata: anndata.AnnData, checker: Checker) -> None:
    whole = adata.X.copy()
    adata.X = (whole > 0).astype(np.float32)
    assert "binarised" in only(checker(adata), "C05", "warning").message
    adata.X = sp.csr_matrix(np.minimum(whole.toarray(), 6))
    assert "equal the maximum, 6" in only(checker(adata), "C05", "warning").message


def test_corrected_counts_need_explicit_rounding(adata: anndata.AnnData, checker: Checker) -> None:
    adata.X.data[::2] *= np.float32(0.93)
    message = only(checker(adata), "C01", "error").message
    assert "SoupX" in message
    assert "--round stochastic" in message
    report = checker(adata, rounding="stochastic")
    assert "rounded (stochastic), as you asked" in only(report, "C06", "warning").message
    assert report.files[0].rounding == "stochastic"


def test_empty_matrix_is_an_error(adata: anndata.AnnData, checker: Checker) -> None:
    adata.X = sp.csr_matrix(adata.shape, dtype=np.float32)
    report = checker(adata)
    assert {"C01"} <= {f.id for f in report.errors}


def test_empty_cells_leave_and_copies_are_told(adata: anndata.AnnData, checker: Checker) -> None:
    dense = adata.X.toarray()
    dense[[3, 9]] = 0
    dense[20] = dense[21] = dense[22]
    dense[30] *= 5000
    adata.X = sp.csr_matrix(dense)
    adata.obs_names = ["a", "a", *adata.obs_names[2:]]
    report = checker(adata)
    assert "2 cells have no counts" in only(report, "B01", "fix").message
    assert np.flatnonzero(~report.files[0].keep).tolist() == [3, 9]
    assert only(report, "B02", "warning").message.startswith("2 cells have exactly the counts of another")
    assert "1 barcodes occur more than once ('a')" in only(report, "B03", "warning").message
    assert "very many counts" in only(report, "B04", "warning").message


def test_copies_are_found_across_files_with_other_gene_orders(adata: anndata.AnnData, checker: Checker) -> None:
    report = checker(adata[:150], adata[140:, ::-1].copy())
    assert "10 cells have" in only(report, "B02", "warning").message
    assert np.array_equal(report.files[1].gene_map, np.arange(80)[::-1])
    assert list(report.genes.index) == list(adata.var_names)


def test_looking_for_duplicates_takes_few_bytes_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "PART", 4096)
    prints = np.random.default_rng(0).integers(0, 1 << 63, (100_000, 2), dtype=np.uint64)
    prints[[7, 99_000]] = prints[50_000]
    prints[3, 0] = prints[4, 0]  # half alike
    list(duplicate_groups([prints], [np.ones(len(prints), bool)]))  # what is compiled takes memory, too
    tracemalloc.start()
    assert list(duplicate_groups([prints], [np.ones(len(prints), bool)])) == [[7, 50_000, 99_000]]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(prints)


def test_duplicate_groups() -> None:
    prints = np.array([[1, 1], [2, 2], [1, 1], [3, 3], [2, 2], [2, 2], [1, 9]], dtype=np.uint64)
    filled = np.array([True] * 7)
    assert sorted(duplicate_groups([prints[:3], prints[3:]], [filled[:3], filled[3:]])) == [[0, 2], [1, 4, 5]]
    filled[1] = False
    assert sorted(duplicate_groups([prints], [filled])) == [[0, 2], [4, 5]]


def test_secondary_cells(adata: anndata.AnnData, checker: Checker) -> None:
    adata.obs["is_primary_data"] = [i >= 12 for i in range(300)]
    assert "--primary-only" in only(checker(adata), "B04", "warning").message
    report = checker(adata, primary_only=True)
    assert "12 cells are copies" in only(report, "B04", "fix").message
    assert report.files[0].keep.sum() == 288


def test_files_are_united_and_roles_are_common(adata: anndata.AnnData, checker: Checker) -> None:
    first, second = adata[:150, :50].copy(), adata[150:, 20:].copy()
    del second.obs["donor"]
    report = checker(first, second)
    assert not report.errors
    assert list(report.genes.index) == list(adata.var_names)
    assert np.array_equal(report.files[1].gene_map, np.arange(20, 80))
    assert set(report.roles.columns()) == {"cell_type", "batch"}
    assert "only 30 of 80 genes are in every file" in only(report, "G02", "warning").message
    given = checker(first, second, roles=Roles(donor="donor"))
    assert "have in common no column 'donor'" in only(given, "O01", "error").message


def test_files_that_name_genes_differently_are_refused(adata: anndata.AnnData, checker: Checker) -> None:
    other = adata.copy()
    other.var_names = other.var["symbol"].astype(str)
    messages = [f.message for f in checker(adata, other).errors]
    assert any("name genes in different ways" in message for message in messages)


def test_everything_wrong_is_shown_at_once(adata: anndata.AnnData, checker: Checker, tmp_path: Path) -> None:
    adata.X = _log1p(adata)
    adata.var_names = ["ENSG00000000001", "ENSG00000000001", *adata.var_names[2:]]
    adata.write_h5ad(tmp_path / "bad.h5ad")
    options = CheckOptions(roles=Roles(cell_type="cell_typ", perturbation="donor", control="nobody"))
    report = check([tmp_path / "missing.h5ad", tmp_path / "bad.h5ad"], options)
    assert [f.id for f in report.errors] == ["C01", "C01", "G01", "O01", "P01"]
    data = json.loads(json.dumps(report.as_json()))
    assert not data["ok"]
    assert len(data["findings"]) == len(report.findings)
    console = Console(width=100, record=True, file=(tmp_path / "out.txt").open("w"))
    report.print(console)
    console.file.close()
    text = console.export_text()
    assert "5 errors to mend" in text
    assert "Did you mean 'cell_type'" in text


def test_a_missing_file_alone_is_reported(tmp_path: Path) -> None:
    report = check([tmp_path / "missing.h5ad"])
    with (tmp_path / "out.txt").open("w") as out:
        report.print(Console(width=100, file=out))
    assert "there is no such file" in (tmp_path / "out.txt").read_text()
    assert not report.as_json()["ok"]


def test_a_good_report_as_table_and_json(adata: anndata.AnnData, checker: Checker, tmp_path: Path) -> None:
    report = checker(adata)
    data = json.loads(json.dumps(report.as_json()))
    assert data["ok"]
    assert (data["cells"], data["genes"], data["organism"]) == (300, 80, "Homo sapiens")
    assert data["files"][0]["matrix"] == "X"
    assert data["roles"]["cell_type"] == "cell_type"
    with (tmp_path / "out.txt").open("w") as out:
        report.print(Console(width=100, file=out))
    assert "Good to build: 300 cells x 80 genes, organism Homo sapiens" in (tmp_path / "out.txt").read_text()


def test_what_many_files_have_in_common_is_said_once(adata: anndata.AnnData, checker: Checker) -> None:
    parts = [adata[100 * i : 100 * (i + 1)].copy() for i in range(3)]
    report = checker(*parts)
    console = Console(width=200, record=True)
    report.print(console)
    shown = console.export_text()
    assert shown.count("only 80 genes: a selection?") == 1
    assert "file1.h5ad and 2 more files: only 80 genes" in shown
    assert sum(finding.id == "G04" and bool(finding.where) for finding in report.findings) == 3  # for programs, each


@pytest.mark.parametrize("given", [False, True])
def test_a_role_with_too_many_labels_is_not_lost_in_silence(
    given: bool, adata: anndata.AnnData, checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "MAX_CATEGORIES", 100)
    labels = [f"L{i % 120}" for i in range(300)]
    adata.obs["perturbation"] = ["control" if i % 2 else label for i, label in enumerate(labels)]
    adata.obs["treatment"] = labels
    roles = Roles(perturbation="treatment", control="L1") if given else Roles()
    report = checker(adata, roles=roles)
    found = [finding for finding in report.findings if "different texts" in finding.message]
    assert [finding.level for finding in found] == ["error" if given else "warning"]
    assert "obs['treatment'] has 120 different texts, and a store keeps at most 100" in found[0].message
    if given:
        assert "--perturbation none" in found[0].message
    else:
        assert report.roles.condition == ()
        assert (report.roles.perturbation, report.roles.control) == ("perturbation", "control")


def test_raw_droplets_are_told(adata: anndata.AnnData, checker: Checker) -> None:
    rng = np.random.default_rng(0)
    fluid = sp.csr_matrix(rng.poisson(0.05, (2000, adata.n_vars)).astype(np.float32))
    deep = sp.csr_matrix(adata.X * 10)
    raw = anndata.AnnData(sp.vstack([deep, fluid]).tocsr(), var=adata.var, uns={"organism": "human"})
    raw.obs_names = [f"b{i}" for i in range(raw.n_obs)]
    said = [f.message for f in checker(raw).findings if f.id == "B04"]
    assert len(said) == 1
    assert "87% of the 2,300 barcodes hold next to nothing" in said[0]
    assert "raw droplets" in said[0]
    assert not [f for f in checker(adata).findings if "droplets" in f.message]


def test_genomic_intervals_are_no_genes(adata: anndata.AnnData, checker: Checker) -> None:
    adata.var_names = [f"chr{1 + i % 22}:{1000 * i}-{1000 * i + 500}" for i in range(10, 90)]
    del adata.var["symbol"]
    assert "holds genomic intervals ('chr11:10000-10500'" in only(checker(adata), "G02", "error").message


def test_the_same_barcode_in_two_files_names_two_cells(
    adata: anndata.AnnData, checker: Checker, tmp_path: Path
) -> None:
    report = checker(adata[:40].copy(), adata[30:70].copy(), adata[100:150].copy())
    assert "10 barcodes occur in several files" in only(report, "B03", "fix").message
    build(report, tmp_path / "store", created_by="test")
    store = Store(tmp_path / "store")
    names = store.names()
    assert len(set(names)) == len(store) == 130
    file, codes = store.column("file")
    assert file.categories == ["file1.h5ad", "file2.h5ad", "file3.h5ad"]
    assert all(name.endswith(f"-{file.categories[code]}") for name, code in zip(names, codes, strict=True))
    other = checker(adata[:40].copy(), adata[40:70].copy())  # nothing is changed where barcodes tell cells apart
    build(other, tmp_path / "other", created_by="test")
    assert set(Store(tmp_path / "other").names()) == set(adata.obs_names[:70])
    assert "file" not in Store(tmp_path / "other").manifest.columns


def test_a_store_has_names_as_categories_and_times_as_numbers(
    adata: anndata.AnnData, checker: Checker, tmp_path: Path
) -> None:
    adata.obs["cell_type"] = np.arange(adata.n_obs) % 3
    adata.obs["cell"] = "x"  # what the index of a file would be called
    adata.obs["time"] = [f"day {i % 4}" for i in range(adata.n_obs)]
    report = checker(adata)
    build(report, tmp_path / "store", created_by="test")
    manifest = Store(tmp_path / "store").manifest
    assert manifest.columns["cell_type"].categories == ["0", "1", "2"]
    assert (manifest.columns["time"].kind, manifest.units, manifest.roles["time"]) == (
        "number",
        {"time": "days"},
        "time",
    )
    assert set(Store(tmp_path / "store").column("time")[1]) == {0, 1, 2, 3}
    to_anndata(Store(tmp_path / "store"), tmp_path / "again.h5ad")
    assert (anndata.read_h5ad(tmp_path / "again.h5ad").obs["cell"] == "x").all()
