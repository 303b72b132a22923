"""``bgen bench perturb``: what is left out is not trained on, and the command tells table and words."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from bgen.bench.quality.perturb import splits
from bgen.errors import UserError
from bgen.tasks.perturb.screen import Columns
from data_tools.simulate.simulate import simulate

COLUMNS = Columns("perturbation", "control", None, ("cell_type",))


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    cells = simulate("demo", cells=3000, seed=1)
    cells = cells[(cells.obs["drug"] == "vehicle").to_numpy()].copy()
    targets = [gene for name in cells.obs["perturbation"].unique() for gene in name.split("+")]
    chosen = cells.var_names.isin([*targets, *cells.var_names[:100]])
    cells = cells[:, chosen].copy()
    cells.obs["batch"] = np.random.default_rng(0).choice(["first", "second"], cells.n_obs)
    return cells


def test_a_group_is_left_out_whole(cells: anndata.AnnData) -> None:
    for split in splits(cells, COLUMNS, "group", "batch", 0):
        assert set(split.back.obs["batch"]) == {split.name}
        assert split.name not in set(split.train.obs["batch"])
        assert set(split.back.obs["perturbation"]) <= set(split.train.obs["perturbation"])
        assert split.back.obs["perturbation"].value_counts().min() >= 20


def test_a_context_is_left_out_but_for_its_control_cells(cells: anndata.AnnData) -> None:
    for split in splits(cells, COLUMNS, "contexts", "batch", 0):
        assert set(split.back.obs["batch"]) == {split.name}
        there = split.train.obs[split.train.obs["batch"] == split.name]
        assert set(there["perturbation"]) == {"control"}
        back = split.back.obs[split.back.obs["perturbation"] == "control"]
        assert set(back.index) == set(there.index)


@pytest.mark.parametrize(("way", "size"), [("targets", 1), ("combinations", 2)])
def test_perturbations_are_left_out_whole(cells: anndata.AnnData, way: str, size: int) -> None:
    (split,) = splits(cells, COLUMNS, way, "2", 0)
    left = set(split.back.obs["perturbation"]) - {"control"}
    assert len(left) == 2
    assert all(len(label.split("+")) == size for label in left)
    assert not left & set(split.train.obs["perturbation"])
    assert "control" in set(split.back.obs["perturbation"])
    with pytest.raises(UserError, match=f"--leave {way}:99: there are only"):
        splits(cells, COLUMNS, way, "99", 0)


def test_inner_doses_are_left_out_one_at_a_time(cells: anndata.AnnData) -> None:
    dosed = cells.copy()
    treated = (dosed.obs["perturbation"] != "control").to_numpy()
    dosed.obs["drug"] = np.where(treated, "dex", "vehicle")
    dosed.obs["amount"] = np.where(treated, np.random.default_rng(0).choice([0.1, 1.0, 10.0, 100.0], dosed.n_obs), 0.0)
    columns = Columns("drug", "vehicle", "amount")
    made = splits(dosed, columns, "doses", "", 0)
    assert [split.name for split in made] == ["dex@1", "dex@10"]
    assert 10.0 not in set(made[1].train.obs["amount"])
    assert set(made[1].back.obs["amount"]) == {0.0, 10.0}
    vehicle = set(dosed.obs_names[~treated])
    assert vehicle <= set(made[1].train.obs_names)
    assert vehicle <= set(made[1].back.obs_names)
    with pytest.raises(UserError, match="no perturbation has three doses"):
        splits(cells, COLUMNS, "doses", "", 0)


def test_bench_perturb_as_in_its_example(bgen: Any, cells: anndata.AnnData, tmp_path: Path) -> None:
    cells.write_h5ad(tmp_path / "cells.h5ad")
    asked = ["bench", "perturb", tmp_path / "cells.h5ad", "--within", "cell_type", "--seeds", 1, "--steps", 4]
    asked += [
        "--out",
        tmp_path / "out",
        "vae.kl_weight=0.2",
        "vae.hidden=32",
        "train.global_batch=128",
        "sample.steps=2",
    ]
    targets = [name for name in cells.obs["perturbation"].unique() if name in cells.var_names]
    (tmp_path / "sets.gmt").write_text("\n".join(f"s{at}\t\t" + "\t".join(targets[at::2]) for at in range(2)))
    done = bgen(*asked, "--leave", "group:batch", "--leave", "targets:2", "--sets", tmp_path / "sets.gmt")
    assert done.code == 0, done
    told = json.loads((tmp_path / "out" / "perturb.json").read_text())["left_out"]
    of_group = ["model", "control copy", "train mean", "train mean, by cells", "same in training", "latent shift"]
    assert list(told["group:batch"]["rows"]) == [*of_group, "duplicate", "ceiling"]
    assert len(told["targets:2"]["perturbations"]) == 2
    low, high = told["group:batch"]["rows"]["model"]["pearson"]["interval"]
    assert low < told["group:batch"]["rows"]["model"]["pearson"]["mean"] < high
    assert "gene sets" in told["targets:2"]["rows"]
    assert told["group:batch"]["headline"] in " ".join(done.out.split())
    assert told["targets:2"]["headline"] in (tmp_path / "out" / "targets-2.html").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "group-batch.html",
        "perturb.json",
        "targets-2.html",
    ]
    if importlib.util.find_spec("cell_eval") is None:
        without = bgen(*asked[:-1], tmp_path / "other", "--leave", "targets:2", "--cell-eval")
        assert without.code == 2
        assert "bgen-flow[perturb]" in without.err
    for leave, message in (("groups:batch", "'group'"), ("targets:x", "targets:N"), ("group:bach", "'batch'")):
        wrong = bgen(*asked, "--leave", leave)
        assert wrong.code == 2, wrong
        assert message in " ".join(wrong.err.split())
