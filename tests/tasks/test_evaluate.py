"""What `bgen evaluate` refuses before it generates anything, and how it reads cells to score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from bgen.errors import UserError
from bgen.evaluate.protocols import distribution as module
from bgen.store.open import open_store
from bgen.tasks.evaluate import score
from bgen.tasks.load import load_model
from data_tools.building.build import build
from data_tools.check.check import CheckOptions, check


def store_of(cells: anndata.AnnData, folder: Path) -> Path:
    build(check([cells], CheckOptions(organism="synthetic", accept_unnamed_genes=True)), folder, created_by="test")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cells: cells[:, :1], "has 1 gene: cells are compared in at least two"),
        (lambda cells: anndata.AnnData(np.ones((200, 3), np.float32), var=cells.var[:3]), "no gene varies among them"),
    ],
)
def test_cells_that_cannot_be_compared(demo: Any, tmp_path: Path, change: Any, message: str) -> None:
    cells = anndata.read_h5ad(demo.cells)
    cells = change(cells[np.asarray(cells.X[:, 0].sum(1)).ravel() > 0]).copy()
    store = store_of(cells, tmp_path / "store")
    with pytest.raises(UserError, match=message):
        score(load_model(demo.model), store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_generated_cells_are_read_like_any_others(demo: Any, tmp_path: Path) -> None:
    cells = anndata.read_h5ad(demo.cells)[:200].copy()
    cells.X.data[0] = np.inf
    cells.write_h5ad(tmp_path / "infinite.h5ad")
    with pytest.raises(UserError, match="NaN or infinite"):
        score(load_model(demo.model), demo.store, tmp_path / "out", generated=tmp_path / "infinite.h5ad")
    cells[:, 1:].write_h5ad(tmp_path / "fewer.h5ad")
    with pytest.raises(UserError, match="119 of the 120 genes"):
        score(load_model(demo.model), demo.store, tmp_path / "out", generated=tmp_path / "fewer.h5ad")
    for seeds in (1, 10**20):
        with pytest.raises(UserError, match="seeds is a number from 2 to 1000"):
            score(load_model(demo.model), demo.store, tmp_path / "out", seeds=seeds)


def test_copies_are_looked_for_among_the_training_cells(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Seen(Exception):
        """Enough: no score, no report."""

    def look(train: Any, test: Any, generated: Any) -> Any:
        seen.extend(len(counts.toarray()) for counts in (train, test))
        raise Seen

    monkeypatch.setattr(module, "memorisation", look)
    with pytest.raises(Seen):
        score(load_model(demo.model), demo.store, tmp_path / "out", seeds=2)
    store = open_store(demo.store)
    assert seen == [len(store.cells_of_split("train")), len(store.cells_of_split("test"))]
    assert seen[0] > seen[1]
