"""Writing results."""

from __future__ import annotations

import os
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from bgen.errors import UserError
from bgen.files import require_new_h5ad, whole, write_h5ad, write_result


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


def test_planted_links_are_not_followed(tmp_path: Path) -> None:
    """In a folder that others write in, they could plant a link under any name that can be foreseen."""
    theirs = tmp_path / "theirs"
    theirs.write_text("precious")
    for name in (".cells.h5ad.partial", ".metrics.json.partial", "metrics.json"):
        (tmp_path / name).symlink_to(theirs)
    write_h5ad(make_cells(), tmp_path / "cells.h5ad")
    write_result(tmp_path / "metrics.json", "{}")
    assert theirs.read_text() == "precious"
    assert not (tmp_path / "metrics.json").is_symlink()
    assert (tmp_path / "metrics.json").read_text() == "{}"


def test_two_that_write_one_file_do_not_harm_each_other(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with whole(target, replace=False) as second:
        with whole(target, replace=False) as first:
            first.write_text("first")
        second.write_text("second")
        with pytest.raises(UserError, match="is there already"), whole(target, replace=False) as third:
            third.write_text("third")
        second.unlink()
        second.mkdir()
        target.unlink()
    assert target.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_there_stays_if_it_cannot_be_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "metrics.json"
    write_result(target, "before")
    mode = target.stat().st_mode & 0o777

    def full(self: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"metrics\.json cannot be written: .*No space left"):
            write_result(target, "after")
    assert target.read_text() == "before"
    write_result(target, "after")
    umask = os.umask(0)
    os.umask(umask)
    assert mode == 0o666 & ~umask  # readable as the umask says, not only for its owner
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("name", ["cells.csv", "cells.loom", "cells.zarr", "cells.parquet"])
def test_a_name_that_promises_another_format_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"written as \.h5ad, not as .*cells\.h5ad"):
        require_new_h5ad(tmp_path / name)


@pytest.mark.parametrize("name", ["cells.h5ad", "cells.H5AD", "cells", "cells-1.5", "cells.h5"])
def test_names_of_cells(tmp_path: Path, name: str) -> None:
    require_new_h5ad(tmp_path / name)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="is there already"):
        require_new_h5ad(tmp_path / name)
