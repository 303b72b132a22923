"""An exported model in a user's hands: AnnData in, AnnData out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest

import bgen
from bgen.data.as_anndata import read_split
from bgen.errors import UserError
from bgen.store.store import Store
from bgen.tasks.generate import draw_rows
from bgen.tasks.load import Model


@pytest.fixture(scope="module")
def model(demo: Any) -> Model:
    return bgen.load(demo.model)


@pytest.fixture(scope="module")
def cells(demo: Any) -> anndata.AnnData:
    return read_split(Store(demo.store), "test")


def test_loading_and_generating_needs_no_trainer(demo: Any) -> None:
    code = f"""
import sys, bgen
cells = bgen.load({str(demo.model)!r}).generate(3)
assert cells.shape == (3, 120)
loaded = {{"deepspeed", "mlflow", "mamba_ssm", "distributed", "torch._dynamo", "sklearn", "ot"}} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_conditions_are_told(model: Model) -> None:
    told = model.conditions
    assert told["time"] == "number"
    assert "control" in told["perturbation"]


def test_the_same_seed_gives_the_same_cells(model: Model) -> None:
    first, again, other = (model.generate(50, seed=seed) for seed in (1, 1, 2))
    assert abs(first.X - again.X).nnz == 0
    assert first.obs.equals(again.obs)
    assert abs(first.X - other.X).nnz > 0


def test_library_size_can_be_fixed(model: Model) -> None:
    totals = np.asarray(model.generate(200, library_size=300.0).X.sum(1)).ravel()
    assert totals.mean() == pytest.approx(300, rel=0.1)
    free = np.asarray(model.generate(200).X.sum(1)).ravel()
    assert free.std() > 3 * totals.std()


def test_conditions_not_asked_for_follow_the_training_cells(model: Model) -> None:
    table = model.saved.combinations
    asked = model.conditions["cell_type"][0]
    made = model.generate(400, where={"cell_type": asked})
    there = table[table["cell_type"] == 0]
    assert set(np.round(made.obs["time"].unique(), 3)) <= set(there["time"].round(3))
    assert made.uns["bgen"]["unseen"] is False or made.uns["bgen"]["unseen"] == 0
    nowhere = model.generate(5, where={"time": 12.25})  # between the times of the training cells
    assert nowhere.uns["bgen"]["unseen"]
    assert (nowhere.obs["time"] == 12.25).all()


def test_conditions_come_in_the_training_cells_proportions() -> None:
    table = pd.DataFrame({"kind": np.arange(4), "cells": [500, 3, 300, 197]})
    drawn = [draw_rows(table, {}, 100, seed)[0]["kind"] for seed in range(200)]
    numbers = np.array([np.bincount(kinds, minlength=4) for kinds in drawn])
    expected = table["cells"].to_numpy() / 10
    assert np.abs(numbers - expected).max() < 1
    np.testing.assert_allclose(numbers.mean(0), expected, atol=0.15)
    # In no order: what cell 0 is follows the proportions, too.
    first = np.bincount([kinds[0] for kinds in drawn], minlength=4) / 2
    np.testing.assert_allclose(first, expected, atol=12)


def test_embedding_matches_genes_by_id(model: Model, cells: anndata.AnnData) -> None:
    embedded = model.embed(cells)
    assert embedded.obsm["X_bgen"].shape == (cells.n_obs, 10)
    assert embedded.obs.equals(cells.obs)
    order = np.random.default_rng(0).permutation(cells.n_vars)
    shuffled = cells[:, order].copy()
    np.testing.assert_allclose(model.embed(shuffled).obsm["X_bgen"], embedded.obsm["X_bgen"], atol=1e-5)
    more = anndata.concat([cells, anndata.AnnData(cells.X * 0, obs=cells.obs)], axis=1, join="outer", merge="first")
    more.var_names = [*cells.var_names, *(f"other{i}" for i in range(cells.n_vars))]
    np.testing.assert_allclose(model.embed(more).obsm["X_bgen"], embedded.obsm["X_bgen"], atol=1e-5)


def test_embedding_refuses_what_it_cannot_read(model: Model, cells: anndata.AnnData) -> None:
    few = cells[:, np.argsort(np.asarray(cells.X.sum(0)).ravel())[:60]].copy()  # with the fewest molecules
    with pytest.raises(UserError, match=r"60 of the 120 genes.*look like"):
        model.embed(few)
    logged = cells.copy()
    logged.X = logged.X.log1p()
    with pytest.raises(UserError, match="not counts"):
        model.embed(logged)


def test_decoding_gives_expected_counts(model: Model, cells: anndata.AnnData) -> None:
    mean, variance = model.encode(cells)
    assert (variance > 0).all()
    library = np.asarray(cells.X.sum(1)).ravel().astype(np.float32)
    expected = model.decode(mean, library, {"batch": cells.obs["batch"].astype(str).tolist()})
    assert expected.shape == cells.shape
    np.testing.assert_allclose(expected.sum(1), library, rtol=1e-4)
    real, decoded = np.asarray(cells.X.mean(0)).ravel(), expected.mean(0)
    assert np.corrcoef(np.log1p(real), np.log1p(decoded))[0, 1] > 0.9


def test_versions_of_ensembl_ids_do_not_matter() -> None:
    from bgen.genes.table import match_genes, plain_ids

    ids = ["ENSG00000240216.7", "ENSMUSG00000000001.4_PAR", "G12.5"]
    assert plain_ids(ids) == ["ENSG00000240216", "ENSMUSG00000000001_PAR", "G12.5"]
    assert plain_ids(["ENSG00000240216.7", "ENSG00000240216.8"]) == ["ENSG00000240216.7", "ENSG00000240216.8"]
    assert match_genes(["G12.5", "ENSG00000240216"], ids, what="the data").tolist() == [2, 0]


@pytest.mark.parametrize(
    "options",
    [
        {"n": 0},
        {"n": 2.5},
        {"n": 10**12},
        {"n": "many"},
        {"seed": -1},
        {"library_size": -5},
        {"library_size": np.nan},
        {"library_size": np.inf},
        {"noise": np.nan},
        {"steps": 10**9},
        {"where": {"time": 1e6}},
        {"where": {"time": np.nan}},
        {"where": {"time": "soon"}},
        {"where": {"dose": -3}},
        {"where": ["time"]},
    ],
    ids=str,
)
def test_what_cannot_be_generated_is_told(demo: Any, options: Any) -> None:
    with pytest.raises(UserError):
        bgen.load(demo.model).generate(**{"n": 3, **options})


def test_times_within_training_are_asked_for_with_their_unit(demo: Any) -> None:
    model = bgen.load(demo.model)
    low, high = (float(f(model.saved.combinations["time"])) for f in (min, max))
    made = model.generate(5, where={"time": f"{(low + high) / 2 / 24} days"})
    assert np.allclose(made.obs["time"], (low + high) / 2)
    with pytest.raises(UserError, match=f"time {high + 1:g} lies outside those of the training cells, {low:g} to"):
        model.generate(5, where={"time": high + 1})


def test_states_and_sizes_have_to_fit(demo: Any) -> None:
    model = bgen.load(demo.model)
    z = np.zeros((2, model.saved.vae.size - 1), np.float32)
    assert model.decode(z, np.ones(2, np.float32)).shape == (2, 120)
    for state, size in ((z[:, :-1], np.ones(2)), (z, np.ones(5))):
        with pytest.raises(UserError, match="Latent states are"):
            model.decode(state, size.astype(np.float32))
