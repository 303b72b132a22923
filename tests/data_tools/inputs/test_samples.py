"""A table with a row for each file: its columns are those of all the file's cells, from the check to the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bgen.errors import UserError
from bgen.store.store import Store
from data_tools.inputs.in_memory import open_memory
from data_tools.inputs.registry import open_source
from data_tools.inputs.samples import read_samples
from data_tools.simulate.simulate import simulate


def test_what_is_known_of_files_becomes_columns_of_their_cells(bgen: Any, tmp_path: Path) -> None:
    cells = simulate("tiny", cells=200)
    del cells.obs["donor"], cells.obs["time"]
    cells[:120].write_h5ad(tmp_path / "a.h5ad")
    cells[120:].write_h5ad(tmp_path / "b.h5ad")
    table = tmp_path / "samples.csv"
    table.write_text("sample,donor,time\na,D1,24\nb.h5ad,D2,48\n")
    files = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    built = bgen("data", "build", *files, "--obs", table, "--out", tmp_path / "store")
    assert built.code == 0, built
    store = Store(tmp_path / "store")
    assert (store.manifest.roles["donor"], store.manifest.roles["time"]) == ("donor", "time")
    assert sorted(store.manifest.columns["donor"].categories) == ["D1", "D2"]
    codes = store.column("donor")[1]
    assert sorted([int((codes == 0).sum()), int((codes == 1).sum())]) == [80, 120]
    table.write_text("sample,donor,time\na,D1,24\n")
    missing = bgen("data", "build", *files, "--obs", table, "--out", tmp_path / "other")
    assert missing.code == 2
    assert "has no row for this file" in " ".join(missing.out.replace("│", " ").split())
    assert not (tmp_path / "other").exists()


def test_a_file_that_two_rows_mean_is_refused(tmp_path: Path) -> None:
    simulate("tiny", cells=100).write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "samples.csv").write_text("sample,plate\na,P1\na.h5ad,P2\n")
    with pytest.raises(UserError, match=r"has 2 rows \(a, a\.h5ad\) for this file"):
        read_samples(tmp_path / "samples.csv").join(open_source(tmp_path / "a.h5ad"))


def test_a_users_annotation_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "samples.csv").write_text("sample,plate,day\nAnnData in memory,P1,3\n")
    cells = simulate("tiny", cells=100)
    source, before = open_memory(cells), list(cells.obs)
    read_samples(tmp_path / "samples.csv").join(source)
    assert (source.obs["plate"].tolist(), source.obs["day"].tolist()) == (["P1"] * 100, [3] * 100)
    assert list(cells.obs) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sample,donor\na,D1\na,D2\n", "names 'a' twice"),
        ("sample,donor\na,\n", "has a gap in column 'donor'"),
        ("sample\na\n", "needs a heading"),
        ("sample,batch\nAnnData in memory,x\n", "obs has a column 'batch' already"),
        ("sample,plate\nother,x\n", "has no row for this file"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "samples.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        read_samples(tmp_path / "samples.csv").join(open_memory(simulate("tiny", cells=100)))


def test_a_table_that_is_not_there_is_named(bgen: Any, tmp_path: Path) -> None:
    simulate("tiny", cells=100).write_h5ad(tmp_path / "a.h5ad")
    done = bgen("data", "check", tmp_path / "a.h5ad", "--obs", tmp_path / "no.csv")
    assert (done.code, "--obs: there is no file" in done.err) == (2, True)
