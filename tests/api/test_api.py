"""bgen from Python: what `dir(bgen)` shows, training on AnnData and stores, settings as arguments, and the examples."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

import bgen
from bgen.api import data as data_module
from bgen.api import train as train_module
from bgen.errors import UserError
from bgen.store.store import Store
from data_tools.simulate.simulate import simulate

QUIET = {"track": {"progress": False, "mlflow": False}}
QUICK: dict[str, Any] = {"steps": 12, "global_batch": 64, "fit_levels": False, **QUIET}


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    return simulate("tiny", seed=0)


@pytest.fixture(scope="module")
def vae(cells: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return bgen.train_vae(cells, tmp_path_factory.mktemp("api") / "vae", latent=8, **QUICK)


def test_what_dir_shows_is_there_and_documented() -> None:
    assert dir(bgen) == sorted(bgen.__all__)
    for name in dir(bgen):
        assert inspect.getdoc(getattr(bgen, name)), name
    with pytest.raises(AttributeError, match="no attribute 'trian_vae'"):
        _ = bgen.trian_vae


def test_cells_in_memory_become_a_store_in_the_run(vae: Any, cells: anndata.AnnData) -> None:
    store = Store(vae.store)
    assert Path(vae.store) == vae.folder / "store"
    assert store.manifest.n_cells == cells.n_obs
    assert vae.model.saved.codec.size == 8 + 1
    assert vae.model.saved.codec.covariates == {"batch": 2} or "batch" in vae.model.saved.codec.covariates
    assert vae.history["train/loss"].notna().any()
    assert vae.history.index.max() == 12


def test_a_flow_is_asked_for_what_the_data_says(vae: Any, tmp_path: Path) -> None:
    flow = bgen.train_flow(vae.store, vae, tmp_path / "flow", **QUICK)
    assert set(flow.model.conditions) == {Store(vae.store).manifest.roles[r] for r in train_module.ASKED} & set(
        Store(vae.store).manifest.columns
    )
    made = flow.model.generate(7, seed=1)
    assert made.shape == (7, len(vae.model.genes))
    again = bgen.load(flow.folder / "model").generate(7, seed=1)
    np.testing.assert_array_equal(made.X.toarray(), again.X.toarray())


def test_the_same_as_the_command_line(vae: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    command = request.getfixturevalue("bgen")
    settings = [f"train.{name}={QUICK[name]}" for name in ("steps", "global_batch")]
    settings += ["vae.fit_levels=false", "vae.latent=8", "vae.covariates=[batch]", "track.mlflow=false"]
    done = command("train", "vae", f"data.store={vae.store}", f"out={tmp_path / 'vae'}", *settings)
    assert done.code == 0, done
    assert bgen.load(tmp_path / "vae" / "model").saved.fingerprint() == vae.model.saved.fingerprint()


def test_trajectories_and_perturbations(vae: Any, tmp_path: Path) -> None:
    small = {
        "data": {"trajectories": {"times": 2, "cells": 8, "pool": 256}},
        "flow": {"backbone": {"name": "mlp", "width": 16, "layers": 1}},
    }
    course = bgen.train_trajectories(
        vae.store, vae, tmp_path / "course", system=["batch"], **{**QUICK, "steps": 3}, **small
    )
    assert course.model.saved.about.trajectories.system == ["batch"]
    screen = bgen.train_perturbation(
        vae.store, vae, tmp_path / "screen", system=["batch"], averages=False, **{**QUICK, "steps": 3}, **small
    )
    assert screen.model.saved.about.perturbation is not None


def test_what_is_wrong_is_told_before_anything_is_written(cells: anndata.AnnData, vae: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for settings, told in (
        ({"stesp": 5}, "There is no setting 'stesp'. Did you mean 'steps'"),
        ({"vae": {"latnt": 5}}, "vae.latnt: unknown key. Did you mean 'latent'"),
        ({"latent": "many"}, "vae.latent"),
        ({"config": "flow"}, "trains a flow, not a vae"),
    ):
        with pytest.raises(UserError, match=told):
            bgen.train_vae(cells, out, **settings)
        assert not out.exists(), settings
    with pytest.raises(UserError, match="Did you mean 'cell_type'"):
        bgen.check(cells, cel_type="x")  # type: ignore[call-arg]
    with pytest.raises(UserError, match="already holds a run"):
        bgen.train_vae(cells, vae.folder, **QUICK)
    with pytest.raises(UserError, match="was built from other cells"):
        bgen.train_vae(cells[:-5].copy(), vae.folder, resume=True, **QUICK)
    bad = cells.copy()
    bad.X = bad.X * 0.37
    with pytest.raises(UserError, match="The data cannot be used yet:\n"):
        bgen.build(bad, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_it_goes_on_where_it_was(cells: anndata.AnnData, vae: Any, tmp_path: Path) -> None:
    part = bgen.train_vae(cells, tmp_path / "vae", latent=8, **{**QUICK, "steps": 5})
    assert part.history.index.max() == 5
    whole = bgen.train_vae(cells, tmp_path / "vae", latent=8, resume=True, **QUICK)
    assert whole.history.index.max() == 12
    assert whole.store == part.store
    assert [path.name for path in whole.folder.glob("store*")] == ["store"]


def test_a_model_saves_itself_and_tells_its_history(vae: Any, cells: anndata.AnnData, tmp_path: Path) -> None:
    model = bgen.load(vae.folder / "model")
    assert "train/loss" in model.history
    moved = model.save(tmp_path / "moved")
    assert bgen.load(moved).saved.fingerprint() == model.saved.fingerprint()
    with pytest.raises(UserError, match="No record"):
        _ = bgen.load(moved).history
    with pytest.raises(UserError, match="there already"):
        model.save(tmp_path / "moved")
    tuned = model.finetune(
        cells, tmp_path / "tuned", task="annotate", label="cell_type", mode="head", overrides=["train.steps=3"]
    )
    assert tuned.saved.about.finetuning.parent.fingerprint == model.saved.fingerprint()
    assert "cell_type_bgen" in tuned.annotate(cells).obs


def test_what_notebooks_show_is_html_without_markup_of_the_data(vae: Any, cells: anndata.AnnData) -> None:
    assert "<table" in vae.model._repr_html_()
    assert "train/loss" in vae._repr_html_()
    named = cells.copy()
    named.obs = named.obs.rename(columns={"cell_type": "<b>type</b>"})
    shown = bgen.check(named, cell_type="<b>type</b>")._repr_html_()
    assert "<b>type</b>" not in shown
    assert "&lt;b&gt;type&lt;/b&gt;" in shown
    assert data_module.Looking.__annotations__.keys() >= {"cell_type", "counts"}
