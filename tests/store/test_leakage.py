"""Leaks between splits are found, each kind by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bgen.errors import UserError
from bgen.store.format.manifest import hash_folder, read_manifest
from bgen.store.leakage import assert_no_leakage
from bgen.store.splits import assign_groups, group_names
from bgen.store.store import Store
from data_tools.building.write import Contents, write_array, write_store


def write(contents: Contents, folder: Path, **changes: object) -> Store:
    write_store(folder, replace(contents, **changes), profile="small", seed=0, created_by="test")  # type: ignore[arg-type]
    return Store(folder)


def by(contents: Contents, column: str, held_out: dict[str, list[str]], spread: str | None = None) -> dict[str, object]:
    fractions = {"train": 0.8, "valid": 0.1, "test": 0.1}
    groups = group_names(contents.obs[column])
    codes = assign_groups(fractions, groups, 0, held_out=held_out, spread=spread)
    return {"split": codes, "split_by": column, "held_out": held_out}


def test_good_splits_pass(contents: Contents, tmp_path: Path) -> None:
    assert_no_leakage(write(contents, tmp_path / "cells"))
    assert_no_leakage(write(contents, tmp_path / "types", **by(contents, "celltype", {})))
    assert_no_leakage(write(contents, tmp_path / "times", **by(contents, "hours", {"test": ["12.5"]})))
    control = {"control": "B", "roles": {"perturbation": "celltype"}}
    held = by(contents, "celltype", {"test": ["NK"]}, spread="B")
    assert_no_leakage(write(contents, tmp_path / "control", **control, **held))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split_by": "celltype"}, r"celltype '(B|T|NK)' is in the splits train and valid and test"),
        ({"split_by": "hours", "held_out": {"test": ["6"]}}, r"hours '6' was held out for test, but is in train and"),
        ({"split_by": "celltype", "roles": {"perturbation": "celltype"}, "control": "B"}, r"celltype '(T|NK)' is in"),
        ({"row": np.zeros(1500, np.int64)}, "1,499 rows of the inputs are in .* twice"),
    ],
)
def test_leaks_are_named(changes: dict[str, object], message: str, contents: Contents, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        assert_no_leakage(write(contents, tmp_path / "store", **changes))


def test_splits_that_are_not_the_manifests_are_found(contents: Contents, tmp_path: Path) -> None:
    store = write(contents, tmp_path / "store")
    write_array(store.folder / "rows/split", np.zeros(1500, np.uint8))
    manifest = read_manifest(store.folder).model_copy(update={"files": hash_folder(store.folder)})
    (store.folder / "manifest.json").write_text(json.dumps(manifest.with_fingerprint().model_dump()))
    with pytest.raises(UserError, match="not those of its manifest"):
        assert_no_leakage(Store(store.folder))
