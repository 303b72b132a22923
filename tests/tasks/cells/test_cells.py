"""Labels, denoised counts and integrated cells, on simulated cells whose truth is known."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

import bgen
from bgen.errors import UserError
from bgen.files import slashes_in_names
from bgen.tasks.cells import annotate
from bgen.tasks.load import Model


@pytest.fixture(scope="module")
def model(demo: Any) -> Model:
    return bgen.load(demo.model)


@pytest.fixture(scope="module")
def cells(demo: Any) -> anndata.AnnData:
    return anndata.read_h5ad(demo.cells)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let classifiers choose among one strength: each costs five fits."""
    monkeypatch.setattr(annotate, "STRENGTHS", annotate.STRENGTHS[3:4])


def half_labelled(cells: anndata.AnnData) -> anndata.AnnData:
    cells = cells.copy()
    del cells.uns["truth"]  # a hundred arrays, to write and to read each time
    truth = cells.obs["cell_type"].astype(str).to_numpy()
    cells.obs["label"] = np.where(np.arange(cells.n_obs) % 2 == 0, truth, "")
    return cells


@pytest.mark.usefixtures("quick")
def test_labels_are_learnt_from_the_users_cells(model: Model, cells: anndata.AnnData) -> None:
    told = model.annotate(half_labelled(cells), "label", threshold=0.0)
    query = np.arange(cells.n_obs) % 2 == 1
    truth = cells.obs["cell_type"].astype(str).to_numpy()[query]
    best = told.obsm["label_probabilities"].idxmax(axis=1).to_numpy()[query]
    score = f1_score(truth, best, average="macro")
    shuffled = f1_score(truth, np.random.default_rng(0).permutation(best), average="macro")
    assert score > shuffled + 0.15
    assert np.allclose(told.obsm["label_probabilities"].sum(axis=1), 1)
    assert told.obs["label_probability"].between(0, 1).all()
    scores = told.uns["bgen_annotate"]["macro_f1"]
    assert set(scores) == {"latent states", "principal components", "variable genes"}
    assert scores[told.uns["bgen_annotate"]["seen"]] == max(scores.values())


@pytest.mark.usefixtures("quick")
def test_what_the_model_cannot_tell_is_unknown(model: Model, cells: anndata.AnnData) -> None:
    given = half_labelled(cells)
    sure, unsure = (model.annotate(given, "label", threshold=t) for t in (0.0, 0.9))
    assert (unsure.obs["label_bgen"] == "unknown").sum() > (sure.obs["label_bgen"] == "unknown").sum()
    told = unsure[unsure.obs["label_bgen"] != "unknown"]
    assert (told.obs["label_probability"] >= 0.9).all()
    assert (told.obs["label_novelty"] <= 1).all()


@pytest.mark.usefixtures("quick")
def test_a_type_that_the_reference_lacks_looks_new(model: Model, cells: anndata.AnnData) -> None:
    given = half_labelled(cells)
    new = (given.obs["cell_type"] == "progenitor").to_numpy()
    given.obs["label"] = np.where(new, "", given.obs["label"])
    novelty = model.annotate(given, "label").obs["label_novelty"].to_numpy()
    known = ~new & (given.obs["label"] == "").to_numpy()
    assert novelty[new].mean() > novelty[known].mean() + 2 * novelty[known].std() / np.sqrt(known.sum())


@pytest.mark.usefixtures("quick")
def test_one_rare_label_stops_nobody(bgen: Any, demo: Any, cells: anndata.AnnData, tmp_path: Path) -> None:
    given = half_labelled(cells)
    given.obs["label"] = given.obs["label"].where(np.arange(cells.n_obs) != 4, "rare")
    given.write_h5ad(tmp_path / "my.h5ad")
    out = tmp_path / "out.h5ad"
    done = bgen("annotate", demo.model, tmp_path / "my.h5ad", "--label", "label", "--out", out)
    assert done.code == 0, done
    assert "whose cells are annotated like the others: rare (1)" in " ".join(done.out.split())
    told = anndata.read_h5ad(out)
    assert "rare" not in told.obsm["label_probabilities"].columns
    assert dict(told.uns["bgen_annotate"]["too_rare"]) == {"rare": 1}
    assert told.uns["bgen_annotate"]["query_cells"] == 301


@pytest.mark.usefixtures("quick")
def test_names_with_slashes_are_written_and_read(bgen: Any, demo: Any, cells: anndata.AnnData, tmp_path: Path) -> None:
    given = half_labelled(cells)
    given.obs["my/label"] = given.obs.pop("label").replace({"A": "NK/T", "B": "NK_T"})
    given.obs["NK"] = "x"
    with slashes_in_names():
        given.write_h5ad(tmp_path / "my.h5ad")
    out = tmp_path / "out.h5ad"
    done = bgen("annotate", demo.model, tmp_path / "my.h5ad", "--label", "my/label", "--out", out)
    assert done.code == 0, done
    told = anndata.read_h5ad(out)
    assert {"NK/T", "NK_T"} & set(told.obs["my_label_bgen"].astype(str))  # values of a column are any text
    assert sorted(told.obsm["my_label_probabilities"].columns) == ["NK_T", "NK_T_2", "progenitor"]
    numbers = dict(told.uns["bgen_annotate"]["reference_cells"])
    assert sum(int(n) for n in numbers.values()) == 300


@pytest.mark.usefixtures("quick")
def test_the_models_own_labels_serve_where_there_are_none(model: Model, cells: anndata.AnnData) -> None:
    bare = cells.copy()
    del bare.obs["cell_type"]
    told = model.annotate(bare, "cell_type", threshold=0.0)
    assert told.uns["bgen_annotate"]["reference"] == "cells generated by the model"
    assert set(told.obsm["cell_type_probabilities"].columns) == set(model.conditions["cell_type"])


def test_denoised_counts_are_closer_to_the_truth(model: Model, cells: anndata.AnnData) -> None:
    from data_tools.simulate.truth import counterfactual_mean

    denoised = model.denoise(cells)
    truth = counterfactual_mean(cells)
    raw = cells.X.toarray()
    assert np.abs(denoised.layers["denoised"] - truth).mean() < 0.7 * np.abs(raw - truth).mean()
    np.testing.assert_allclose(denoised.layers["denoised"].sum(1), raw.sum(1), rtol=1e-3)
    deep = model.denoise(cells, library_size=1e4)
    np.testing.assert_allclose(deep.layers["denoised"].sum(1), 1e4, rtol=1e-3)
    part = model.denoise(cells[:, :110].copy())
    np.testing.assert_allclose(part.layers["denoised"].sum(1), raw[:, :110].sum(1), rtol=1e-3)
    extra = cells[:, :3].copy()
    extra.var_names = ["X1", "X2", "X3"]
    more = anndata.concat([cells, extra], axis=1, merge="first")
    assert np.isnan(model.denoise(more).layers["denoised"][:, -3:]).all()


def test_integration_decodes_every_cell_as_of_one_batch(model: Model, cells: anndata.AnnData) -> None:
    made = model.integrate(cells, reference="batch_1")
    assert made.obsm["X_bgen_integrated"].shape == (cells.n_obs, 10)
    own = (cells.obs["batch"] == "batch_1").to_numpy()
    library = np.asarray(cells.X.sum(1)).ravel()
    z, _ = model.encode(cells)
    as_measured = model.decode(z, library, {"batch": cells.obs["batch"].astype(str).to_numpy()})
    there = [model.genes.index(gene) for gene in cells.var_names]
    np.testing.assert_allclose(made.layers["integrated"][own], as_measured[own][:, there], rtol=1e-3, atol=1e-5)
    assert np.abs(made.layers["integrated"][~own] - as_measured[~own][:, there]).max() > 0.01
    assert 0 < made.uns["bgen_integrate"]["mixing"] < 1.5
    names = [cells.var_names[7], cells.var_names[2]]
    some = model.integrate(cells, reference="batch_1", genes=names, neighbours=5)
    assert some.var_names.tolist() == sorted(names, key=cells.var_names.get_loc)
    np.testing.assert_array_equal(some.layers["integrated"], made[:, some.var_names].layers["integrated"])
    assert {"distances", "connectivities"} == set(some.obsp)


def test_neighbours_go_where_scanpy_looks_for_them(bgen: Any, demo: Any, tmp_path: Path) -> None:
    for verb, of in (("embed", "X_bgen"), ("integrate", "X_bgen_integrated")):
        out = tmp_path / f"{verb}.h5ad"
        done = bgen(verb, demo.model, demo.cells, "--neighbours", "10", "--out", out)
        assert done.code == 0, done
        made = anndata.read_h5ad(out)
        assert made.uns["neighbors"]["params"]["use_rep"] == of
        assert made.obsp[made.uns["neighbors"]["distances_key"]].getnnz(1).tolist() == [9] * made.n_obs
        assert made.obsp[made.uns["neighbors"]["connectivities_key"]].shape == (made.n_obs, made.n_obs)
    refused = bgen("embed", demo.model, demo.cells, "--neighbours", "10", "--out", tmp_path / "out.zarr")
    assert refused.code == 2
    assert "it is for --out NAME.h5ad" in " ".join(refused.err.split())


@pytest.mark.usefixtures("quick")
def test_labels_keep_the_colours_of_the_column(model: Model, cells: anndata.AnnData) -> None:
    given = cells.copy()
    given.obs["cell_type"] = given.obs["cell_type"].astype("category").cat.reorder_categories(["progenitor", "B", "A"])
    given.uns["cell_type_colors"] = ["#00aa00", "#0000bb", "#aa0000"]
    told = model.annotate(given, "cell_type", threshold=0.0)
    colours = dict(zip(told.obs["cell_type_bgen"].cat.categories, told.uns["cell_type_bgen_colors"], strict=True))
    wanted = {"A": "#aa0000", "B": "#0000bb", "progenitor": "#00aa00", "unknown": "#d3d3d3"}
    assert colours == {name: wanted[name] for name in colours}
    assert len(colours) > 2
    assert list(told.uns["cell_type_colors"]) == given.uns["cell_type_colors"]
    del given.uns["cell_type_colors"]
    assert "cell_type_bgen_colors" not in model.annotate(given, "cell_type").uns


def test_scoring_an_integration_needs_its_library(model: Model, cells: anndata.AnnData) -> None:
    if importlib.util.find_spec("scib_metrics") is None:
        with pytest.raises(UserError, match=r"pip install 'bgen-flow\[integration\]'"):
            model.integrate(cells, label="cell_type")
    with pytest.raises(UserError, match="no column 'type'"):
        model.integrate(cells, label="type")


def test_mistakes_are_told(model: Model, cells: anndata.AnnData) -> None:
    def wrong(fix: str, verb: Any, *arguments: Any, **options: Any) -> None:
        with pytest.raises(UserError, match=fix):
            verb(*arguments, **options)

    bare = cells.copy()
    bare.obs["label"] = ""
    wrong("nothing to learn 'label' from", model.annotate, bare, "label")
    bare.obs.loc[bare.obs_names[:7], "label"] = ["a"] * 5 + ["b"] * 2
    wrong(r"fewer than 5 reference cells: b \(2\)", model.annotate, bare, "label")
    bare.obs["label"] = "a"
    wrong("at least two labels", model.annotate, bare, "label")
    wrong("probability from 0", model.annotate, cells, "cell_type", threshold=2.0)
    wrong("is empty", model.annotate, cells[:0], "cell_type")
    wrong("no layer 'count'", model.denoise, cells, layer="count")
    wrong("library_size is a number from 1", model.denoise, cells, library_size=0)
    wrong("no batch 'batch_9'.*batch_", model.integrate, cells, reference="batch_9")
    wrong("knows no gene 'nothing'", model.integrate, cells, genes=["nothing"])
    wrong("no covariate 'donor'", model.integrate, cells, batch="donor")
    other = cells.copy()
    other.obs["batch"] = "elsewhere"
    wrong("knows none of the batches.*bgen finetune", model.integrate, other)
    del other.obs["batch"]
    wrong("obs has no column 'batch'", model.integrate, other)
    other.var = pd.DataFrame(index=[f"ENSG{i}" for i in range(other.n_vars)])  # no symbols either
    wrong("0 of the 120 genes", model.denoise, other)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("verb", "written"),
    [
        (["embed"], "X_bgen"),
        (["annotate", "--label", "cell_type"], "cell_type_bgen"),
        (["denoise"], "denoised"),
        (["integrate"], "integrated"),
    ],
)
def test_verbs_do_what_their_example_says(bgen: Any, demo: Any, tmp_path: Path, verb: list[str], written: str) -> None:
    out = tmp_path / "out.h5ad"
    help_text = bgen(*verb[:1], "--help").out
    assert f"bgen {verb[0]} bgen-demo/model my.h5ad" in " ".join(help_text.split())
    done = bgen(verb[0], demo.model, demo.cells, *verb[1:], "--out", out)
    assert done.code == 0, done
    made = anndata.read_h5ad(out)
    assert written in {*made.obs, *made.layers, *made.obsm}
    again = bgen(verb[0], demo.model, demo.cells, *verb[1:], "--out", out)
    assert again.code == 2
    assert "there already" in again.err
    missing = bgen(verb[0], demo.model, tmp_path / "no.h5ad", *verb[1:], "--out", tmp_path / "x.h5ad")
    assert missing.code == 2
    assert "There is no file" in missing.err
