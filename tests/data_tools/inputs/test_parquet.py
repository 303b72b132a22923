"""Parquet files of cells as lists of genes: what is read, from one file to a trained model, and what is refused."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from bgen.errors import UserError
from bgen.store.store import Store
from data_tools.inputs.registry import members, open_source
from data_tools.simulate.simulate import simulate

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(
    cells: anndata.AnnData, folder: Path, name: str = "train-0.parquet", *, marker: bool = True, **options: Any
) -> Path:
    """Write cells as Tahoe-100M is: tokens from 3 on, in no order, behind a marker."""
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(cells.X)
    genes, values = [], []
    for row in range(cells.n_obs):
        part = slice(counts.indptr[row], counts.indptr[row + 1])
        order = rng.permutation(part.stop - part.start)
        genes.append([1] * marker + (counts.indices[part][order] + 3).tolist())
        values.append([-2.0] * marker + counts.data[part][order].tolist())
    table = pa.table(
        {
            "genes": pa.array(genes, pa.list_(pa.int64())),
            "expressions": pa.array(values, pa.list_(pa.float32())),
            "BARCODE_SUB_LIB_ID": cells.obs_names.tolist(),
            "drug": ["DMSO_TF" if kind == "control" else kind for kind in cells.obs["perturbation"].astype(str)],
            "cell_line_id": cells.obs["cell_type"].astype(str).tolist(),
        }
    )
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "metadata").mkdir(exist_ok=True)
    pq.write_table(table, folder / "data" / name, **({"row_group_size": 70} | options))
    tokens = pa.table(
        {
            "gene_symbol": [f"S{name}" for name in cells.var_names],
            "ensembl_id": cells.var_names.tolist(),
            "token_id": np.arange(cells.n_vars) + 3,
        }
    )
    pq.write_table(tokens, folder / "metadata" / "gene_metadata.parquet")
    return folder / "data" / name


@pytest.mark.parametrize("marker", [True, False])
def test_rows_are_those_that_were_written(tmp_path: Path, marker: bool) -> None:
    cells = simulate("tiny", cells=200)
    path = write(cells, tmp_path, marker=marker)
    source = pickle.loads(pickle.dumps(open_source(path)))
    assert (source.kind, source.n_cells, source.var().index.tolist()) == ("parquet", 200, cells.var_names.tolist())
    assert source.obs.index.tolist() == cells.obs_names.tolist()
    assert list(source.obs) == ["drug", "cell_line_id"]
    whole = sp.vstack([block for _, block in source.iterate(rows_per_chunk=33)])
    assert (whole != cells.X).nnz == 0
    parts = list(source.iterate(start=65, stop=75, rows_per_chunk=50))
    assert [at for at, _ in parts] == [65, 70]  # row groups end at 70
    assert (sp.vstack([part for _, part in parts]) != cells.X[65:75]).nnz == 0
    assert (source.read().X != cells.X).nnz == 0


def test_a_folder_goes_from_files_to_a_trained_model(bgen: Any, tmp_path: Path) -> None:
    cells = simulate("tiny", cells=300)
    cells.var_names = [f"ENSG{number:011d}" for number in range(cells.n_vars)]
    write(cells[:200], tmp_path / "tahoe")
    write(cells[200:], tmp_path / "tahoe", "train-1.parquet")
    assert [one.name for one in members(tmp_path / "tahoe")] == ["train-0.parquet", "train-1.parquet"]
    given = ["--cell-type", "cell_line_id", "--perturbation", "drug", "--control", "DMSO_TF"]
    built = bgen("data", "build", tmp_path / "tahoe", *given, "--out", tmp_path / "store")
    assert built.code == 0, built
    manifest = Store(tmp_path / "store").manifest
    assert (manifest.n_cells, {source.kind for source in manifest.sources}) == (300, {"parquet"})
    quick = ["train.steps=4", "train.global_batch=64", "train.eval_every=2", "track.mlflow=false"]
    quick += ["vae.covariates=[]"]
    trained = bgen("train", "demo/vae", f"data.store={tmp_path / 'store'}", f"out={tmp_path / 'run'}", *quick)
    assert trained.code == 0, trained


def test_what_is_wrong_is_told(bgen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = simulate("tiny", cells=100)
    path = write(cells, tmp_path / "a")
    (tmp_path / "a" / "metadata" / "gene_metadata.parquet").rename(tmp_path / "kept.parquet")
    with pytest.raises(UserError, match=r"there is no gene_metadata\.parquet"):
        open_source(path)
    short = pq.read_table(tmp_path / "kept.parquet").slice(0, 50)
    pq.write_table(short, tmp_path / "a" / "data" / "gene_metadata.parquet")
    with pytest.raises(UserError, match=r"is no gene of gene_metadata\.parquet"):
        list(open_source(path).iterate())
    twice = pa.concat_tables([short, short])
    pq.write_table(twice, tmp_path / "a" / "data" / "gene_metadata.parquet")
    with pytest.raises(UserError, match="some value comes twice"):
        open_source(path)
    path = write(cells, tmp_path / "b")
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["expressions"]), path)
    with pytest.raises(UserError, match="expressions is missing"):
        open_source(path)
    lists = table.column("expressions").to_pylist()
    lists[3] = lists[3][:-1]
    pq.write_table(table.set_column(1, "expressions", pa.array(lists, pa.list_(pa.float32()))), path)
    with pytest.raises(UserError, match="lists of different lengths"):
        list(open_source(path).iterate())
    lists[3] = None
    pq.write_table(table.set_column(1, "expressions", pa.array(lists, pa.list_(pa.float32()))), path)
    with pytest.raises(UserError, match="has gaps"):
        list(open_source(path).iterate())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    done = bgen("data", "check", path)
    assert (done.code, "Traceback" in done.err) == (2, False)


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(simulate("tiny", cells=100), tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'bgen-flow\[parquet\]'"):
        open_source(path)


def test_names_of_cells_are_made_where_there_are_none(tmp_path: Path) -> None:
    cells = simulate("tiny", cells=100)
    path = write(cells, tmp_path)
    pq.write_table(pq.read_table(path).drop_columns(["BARCODE_SUB_LIB_ID"]), path)
    assert open_source(path).obs.index[:2].tolist() == ["cell_0", "cell_1"]
    assert pd.Index(open_source(path).obs.columns).tolist() == ["drug", "cell_line_id"]
