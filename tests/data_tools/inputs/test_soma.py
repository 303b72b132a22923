"""SOMA experiments: what is read, from one to a trained model, and what is refused."""

from __future__ import annotations

import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from bgen.errors import UserError
from bgen.store.store import Store
from data_tools.inputs.registry import open_source
from data_tools.simulate.simulate import simulate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its libraries remark on as they are loaded
    soma = pytest.importorskip("tiledbsoma", reason="the extra census is not installed")
    soma_io = pytest.importorskip("tiledbsoma.io")


def write(cells: anndata.AnnData, path: Path, measurement: str = "RNA", layer: str = "raw") -> Path:
    """Write counts, obs and var as an experiment."""
    plain = anndata.AnnData(cells.X, obs=cells.obs, var=cells.var)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that pandas and anndata will change
        soma_io.from_anndata(str(path), plain, measurement_name=measurement, X_layer_name=layer)
    return path


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    made = simulate("tiny", cells=300)
    made.var_names = [f"ENSG{number:011d}" for number in range(made.n_vars)]
    return made


@pytest.fixture(scope="module")
def experiment(cells: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(cells, tmp_path_factory.mktemp("soma") / "experiment")


def request(folder: Path, experiment: Path, *lines: str) -> Path:
    path = folder / "some.soma.yaml"
    path.write_text("\n".join([f"experiment: {experiment}", *lines]))
    return path


def test_rows_are_those_that_were_written(experiment: Path, cells: anndata.AnnData) -> None:
    source = pickle.loads(pickle.dumps(open_source(experiment)))
    assert (source.kind, source.n_cells, source.notes) == ("soma", 300, ())
    assert source.var().index.tolist() == cells.var_names.tolist()
    assert source.obs.index.tolist() == cells.obs_names.tolist()
    assert list(source.obs) == list(cells.obs)
    assert source.matrices["X"].stored == cells.X.nnz
    whole = sp.vstack([block for _, block in source.iterate(rows_per_chunk=33)])
    assert (whole != cells.X).nnz == 0
    parts = list(source.iterate(start=65, stop=175, rows_per_chunk=50))
    assert [at for at, _ in parts] == [65, 115, 165]
    assert (sp.vstack([part for _, part in parts]) != cells.X[65:175]).nnz == 0
    assert (source.read().X != cells.X).nnz == 0
    assert source.size() > 0
    assert source.state() == open_source(experiment).state()


def test_the_cells_that_are_wanted_are_read(experiment: Path, cells: anndata.AnnData, tmp_path: Path) -> None:
    path = request(tmp_path, experiment, "cells: cell_type == 'B' and time > 0", "columns: [donor, cell_type]")
    source = open_source(path)
    wanted = cells[(cells.obs["cell_type"] == "B") & (cells.obs["time"] > 0)]
    assert 0 < wanted.n_obs < 300
    assert source.obs.index.tolist() == wanted.obs_names.tolist()
    assert list(source.obs) == ["donor", "cell_type"]
    assert source.obs["cell_type"].astype(str).unique().tolist() == ["B"]
    if isinstance(source.obs["cell_type"].dtype, pd.CategoricalDtype):
        assert source.obs["cell_type"].cat.categories.tolist() == ["B"]
    whole = sp.vstack([block for _, block in source.iterate(rows_per_chunk=7)])
    assert (whole != wanted.X).nnz == 0
    lines = ("cells: cell_type == 'A'", "columns: [donor, cell_type]")
    assert source.state() != open_source(request(tmp_path, experiment, *lines)).state()
    assert source.state() != open_source(request(tmp_path, experiment, "cells: cell_type == 'B' and time > 0")).state()


def test_an_experiment_goes_to_a_trained_model(bgen: Any, experiment: Path, tmp_path: Path) -> None:
    """The page's example: some cells of an experiment, checked, built and trained on."""
    path = request(tmp_path, experiment, "cells: time >= 0", "columns: [cell_type, batch]")
    done = bgen("data", "check", path)
    assert done.code == 0, done
    done = bgen("data", "build", path, "--out", tmp_path / "store", "--splits", "train=0.8,valid=0.2")
    assert done.code == 0, done
    store = Store(tmp_path / "store")
    assert len(store) == 300
    assert store.manifest.sources[0].kind == "soma"
    assert set(store.names()) == set(open_source(experiment).obs.index)
    train = ["train.steps=2", "train.global_batch=32", "track.mlflow=false", "track.progress=false"]
    train += [f"data.store={tmp_path / 'store'}", f"out={tmp_path / 'vae'}"]
    done = bgen("train", "demo/vae", *train)
    assert done.code == 0, done
    done = bgen("embed", tmp_path / "vae/model", experiment, "--out", tmp_path / "embedded.zarr")
    assert done.code == 0, done
    assert anndata.read_zarr(tmp_path / "embedded.zarr").obsm["X_bgen"].shape[0] == 300


def test_other_names_are_understood_or_said(cells: anndata.AnnData, tmp_path: Path) -> None:
    source = open_source(write(cells, tmp_path / "named", "genes", "umis"))
    assert list(source.matrices) == ["X"]
    assert source.notes == ("Of the experiment the measurement 'genes' is read, its layer 'umis' as X.",)
    path = write(cells, tmp_path / "layers", layer="normalised")
    with soma.Experiment.open(str(path), "w") as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        soma_io.add_X_layer(opened, "RNA", "umis", cells.X)
    assert list(open_source(path).matrices) == ["layers/normalised", "layers/umis"]


def said(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        open_source(path)
    return str(raised.value)


def test_what_is_no_experiment_is_refused_in_a_sentence(
    bgen: Any, experiment: Path, cells: anndata.AnnData, tmp_path: Path
) -> None:
    assert "is no SOMA experiment, but a collection that holds RNA." in said(experiment / "ms")
    assert "no SOMA experiment at" in said(request(tmp_path, tmp_path / "nothing"))
    assert "has no measurement 'rna'. Did you mean 'RNA'?" in said(request(tmp_path, experiment, "measurement: rna"))
    assert "no column 'cell_typ'. Did you mean" in said(request(tmp_path, experiment, "columns: [cell_typ]"))
    assert "no setting 'colums'. Did you mean 'columns'?" in said(request(tmp_path, experiment, "colums: [donor]"))
    assert "no cell of the experiment is one of `cells: time < 0`" in said(
        request(tmp_path, experiment, "cells: time < 0")
    )
    assert "`cells: nothing == 'B'` cannot be understood" in said(
        request(tmp_path, experiment, "cells: nothing == 'B'")
    )
    assert "cells is a text, not 3" in said(request(tmp_path, experiment, "cells: 3"))
    (tmp_path / "bad.soma.yaml").write_text("cells: [")
    assert "cannot be read as YAML" in said(tmp_path / "bad.soma.yaml")
    (tmp_path / "bad.soma.yaml").write_text("cells: time > 0")
    assert "has to say `experiment:`" in said(tmp_path / "bad.soma.yaml")
    two = write(cells, tmp_path / "two", "protein")
    with soma.Experiment.open(str(two), "w") as opened:
        opened.ms.add_new_collection("peaks", soma.Measurement)
    assert "has the measurements peaks, protein, none of them 'RNA'" in said(two)
    empty = write(cells, tmp_path / "empty")
    with soma.Experiment.open(str(empty), "d") as opened:
        del opened.ms["RNA"].X["raw"]
    assert "measurement 'RNA' has no X, so there are no counts" in said(empty)
    done = bgen("data", "check", experiment / "ms")
    assert done.code == 2
    assert "Traceback" not in done.err + done.out


def test_without_tiledbsoma_it_is_said_what_to_install(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiledbsoma", None)
    with pytest.raises(UserError, match=r"need tiledbsoma: pip install 'bgen-flow\[census\]'"):
        open_source(experiment)


def test_values_of_unknown_genes_are_damage(experiment: Path) -> None:
    source: Any = open_source(experiment)
    source.genes = source.genes[:-1] + np.array([0] * (len(source.genes) - 2) + [500])
    with pytest.raises(UserError, match="values of genes that var does not have"):
        list(source.iterate())
