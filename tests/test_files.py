"""Writing results."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from bgen.errors import UserError
from bgen.files import write_h5ad


def make_cells() -> anndata.AnnData:
    obs = pd.DataFrame({"dose/hours": [0.5, 2.0, 8.0], "a/b c": ["x", "y", "x"]}, index=["c0", "c1", "c2"])
    return anndata.AnnData(np.eye(3, 2, dtype=np.float32), obs=obs)


def test_names_with_slashes_come_back(tmp_path: Path) -> None:
    cells = make_cells()
    write_h5ad(cells, tmp_path / "cells.h5ad")
    back = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert back.obs["dose/hours"].tolist() == [0.5, 2.0, 8.0]
    assert back.obs["a/b c"].tolist() == ["x", "y", "x"]
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: anndata.AnnData, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(anndata.AnnData, "write_h5ad", full)
    with pytest.raises(UserError, match=r"cells\.h5ad cannot be written: .*No space left on device"):
        write_h5ad(make_cells(), tmp_path / "cells.h5ad")
    assert list(tmp_path.iterdir()) == []
