"""A format of cells is one file and one line in the registry: here one is added from outside, and used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from numpy.testing import assert_array_equal

from bgen.store.store import Store
from data_tools.inputs.registry import FORMATS, Format
from data_tools.inputs.source import Matrix, Source


@dataclass
class TableSource(Source):
    """A table of counts: a line per cell, a column per gene, and a column of cell types."""

    def _rows(self, name: str, step: int, start: int, stop: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        values = pd.read_csv(self.path, index_col="cell").drop(columns="cell_type").to_numpy(np.float32)
        for first in range(start, stop, step):
            yield first, sp.csr_matrix(values[first : min(first + step, stop)])


def open_table(path: Path) -> TableSource:
    table = pd.read_csv(path, index_col="cell")
    obs, var = table[["cell_type"]], pd.DataFrame(index=table.columns.drop("cell_type"))
    about = {"X": Matrix((len(obs), len(var)), np.dtype(np.float32), "dense", -1)}
    return TableSource(path, "table", obs, {"X": var}, about, {"organism": "synthetic"})


TABLE = Format("tables of counts", lambda path: path.suffix == ".csv", open_table)


def test_a_format_from_outside_is_checked_built_and_embedded(
    bgen: Any, demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = anndata.read_h5ad(demo.cells)[:40].copy()
    table = pd.DataFrame(cells.X.toarray().astype(int), index=cells.obs_names, columns=cells.var_names)
    table.assign(cell_type=cells.obs["cell_type"].astype(str)).to_csv(tmp_path / "cells.csv", index_label="cell")
    unknown = bgen("data", "check", tmp_path / "cells.csv")
    assert unknown.code == 2
    assert "does not read this format" in " ".join(unknown.out.split())
    assert "tables of counts" not in unknown.out

    monkeypatch.setitem(FORMATS, "table", TABLE)
    checked = bgen("data", "check", tmp_path / "cells.csv")
    assert checked.code == 0, checked
    built = bgen("data", "build", tmp_path / "cells.csv", "--out", tmp_path / "store")
    assert built.code == 0, built
    store = Store(tmp_path / "store")
    assert store.manifest.n_cells == 40
    assert store.manifest.sources[0].kind == "table"
    made = bgen("embed", demo.model, tmp_path / "cells.csv", "--out", tmp_path / "embedded.h5ad")
    assert made.code == 0, made
    embedded = anndata.read_h5ad(tmp_path / "embedded.h5ad")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    cells.obs = cells.obs[["cell_type"]]
    cells.write_h5ad(tmp_path / "same.h5ad")
    assert bgen("embed", demo.model, tmp_path / "same.h5ad", "--out", tmp_path / "same_embedded.h5ad").code == 0
    assert_array_equal(embedded.obsm["X_bgen"], anndata.read_h5ad(tmp_path / "same_embedded.h5ad").obsm["X_bgen"])
    assert embedded.obs["cell_type"].astype(str).tolist() == cells.obs["cell_type"].astype(str).tolist()
    assert (sp.csr_matrix(embedded.X) != cells.X).nnz == 0


def test_what_is_not_known_is_told_with_what_is(bgen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cells.txt").write_text("nothing\n")
    monkeypatch.setitem(FORMATS, "table", TABLE)
    said = " ".join(bgen("data", "check", tmp_path / "cells.txt").out.split())
    assert "10x .mtx folders, " in said
    assert " and tables of counts." in said
