"""What goes into a store, and where: rounding, the genes of a reference, roles, splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made import contents_of, contents_of_files, random_counts, same_frames, small_pieces, write_h5ad

from bgen.errors import UserError
from bgen.store.store import Store
from data_tools.building.build import build
from data_tools.check.check import CheckOptions, check
from data_tools.check.findings import Roles


def test_stochastic_rounding_belongs_to_cell_and_gene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = random_counts(400, 3)
    counts.data[::3] += 0.25
    file = write_h5ad(tmp_path / "soup.h5ad", counts)
    options = CheckOptions(counts="X", rounding="stochastic")
    build(check([file], options), tmp_path / "whole", created_by="test")
    small_pieces(monkeypatch)
    build(check([file], options), tmp_path / "cut", created_by="test")
    found = contents_of(Store(tmp_path / "cut"))
    assert same_frames(found, contents_of(Store(tmp_path / "whole")))
    added = found["count"].sum() - np.floor(counts.data).sum()
    assert abs(added / (len(counts.data) / 3) - 0.25) < 0.03
    assert Store(tmp_path / "cut").manifest.sources[0].rounding == "stochastic"


def test_a_reference_decides_the_genes(files: list[Path], tmp_path: Path) -> None:
    reference = tmp_path / "panel.txt"
    wanted = [f"GENE{i:011d}" for i in range(650, 850)]  # 600 to 799 are in the inputs; the last 50 in none
    reference.write_text("\n".join(wanted) + "\n")
    report = check(files)
    manifest = build(report, tmp_path / "store", created_by="test", reference=reference)
    store = Store(tmp_path / "store")
    assert sorted(store.genes["id"]) == wanted
    expected = contents_of_files(files)
    expected = expected[expected["gene"].isin(wanted)].reset_index(drop=True)
    assert same_frames(contents_of(store), expected)
    assert (manifest.vocabulary, manifest.sources[0].genes, manifest.sources[0].genes_left_out) == (
        "panel.txt",
        50,
        650,
    )
    assert manifest.n_cells == 1401
    # the genes of a store are a reference too, with its symbols
    again = build(report, tmp_path / "again", created_by="test", reference=tmp_path / "store")
    assert again.genes_sha256 == manifest.genes_sha256
    reference.write_text("TP53\nTP54\n")
    with pytest.raises(UserError, match=r"none of the inputs' genes.*TP53"):
        build(report, tmp_path / "other", created_by="test", reference=reference)
    reference.write_text("TP53\nTP53\n")
    with pytest.raises(UserError, match="TP53 twice"):
        build(report, tmp_path / "other", created_by="test", reference=reference)


def test_several_conditions_keep_their_role(files: list[Path], tmp_path: Path) -> None:
    options = CheckOptions(roles=Roles(condition=("drug", "dish"), cell_type="cell_type"))
    build(check(files, options), tmp_path / "store", created_by="test")
    store = Store(tmp_path / "store")
    assert store.column_name("condition") == "drug"
    assert store.column_name("condition_2") == "dish"


def test_groups_and_held_out_values_keep_to_their_split(files: list[Path], tmp_path: Path) -> None:
    report = check(files)
    build(report, tmp_path / "donors", created_by="test", split_by="donor")
    store = Store(tmp_path / "donors")
    splits = [set(store.column("donor")[1][store.cells_of_split(name)]) for name in ("train", "valid", "test")]
    assert sum(map(len, splits)) == 6
    assert set.union(*splits) == set(range(6))

    options = {"created_by": "test", "split_by": "time", "held_out": {"test": ["48"]}}
    manifest = build(report, tmp_path / "times", **options)
    assert manifest.held_out == {"test": ["48"]}
    store = Store(tmp_path / "times")
    assert set(store.column("time")[1][store.cells_of_split("test")]) == {48.0}
    assert set(store.column("time")[1][store.cells_of_split("train")]) == {0.0, 6.0}
    ratio = len(store.cells_of_split("valid")) / len(store.cells_of_split("train"))
    assert abs(ratio - 1 / 8) < 0.01

    report = check(files, CheckOptions(roles=Roles(perturbation="perturbation", control="control")))
    build(report, tmp_path / "perturbed", created_by="test", split_by="perturbation")
    store = Store(tmp_path / "perturbed")
    names = store.column("perturbation")[0].categories
    splits = [
        {names[i] for i in store.column("perturbation")[1][store.cells_of_split(s)]} for s in ("train", "valid", "test")
    ]
    assert all("control" in split for split in splits)
    assert sorted(name for split in splits for name in split if name != "control") == ["G1", "G2", "G3"]
    with pytest.raises(UserError, match="Did you mean 'G3'"):
        build(
            report,
            tmp_path / "x",
            created_by="test",
            split_by="perturbation",
            held_out={"test": ["G33"]},
        )
    with pytest.raises(UserError, match="is the control"):
        build(
            report,
            tmp_path / "x",
            created_by="test",
            split_by="perturbation",
            held_out={"test": ["control"]},
        )
