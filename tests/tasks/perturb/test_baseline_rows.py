"""Which baselines there are for which perturbation, from cells of several lines and batches."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from bgen.genes.expression import log_cp10k
from bgen.genes.sets import GeneSets
from bgen.tasks.perturb.baseline_rows import BaselineRows
from bgen.tasks.perturb.keys import screen_keys
from bgen.tasks.perturb.screen import Columns

NONE = np.array([], np.int64)
GENES = pd.DataFrame({"id": [f"g{number}" for number in range(12)], "symbol": [f"G{number}" for number in range(12)]})


def rows_of(
    cells: anndata.AnnData, columns: Columns, contexts: list[str], sets: GeneSets | None = None
) -> BaselineRows:
    return BaselineRows(cells, sp.csr_matrix(cells.X), screen_keys(cells, columns), columns, GENES, contexts, sets)


def screen(labels: list[str], lines: list[str], size: int = 40, dose: list[float] | None = None) -> anndata.AnnData:
    """``size`` cells of every label in every line and in each of two batches that differ in depth of some genes."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame([(p, line, b) for p in labels for line in lines for b in "xy" for _ in range(size)])
    obs.columns = pd.Index(["p", "line", "batch"])
    rates = np.full((len(obs), 12), 3.0)
    for number, line in enumerate(lines):
        rates[obs["line"] == line, number] *= 4
    rates[obs["batch"] == "y", 10:] *= 5
    for number, label in enumerate(labels[1:]):
        rates[obs["p"] == label, 5 + number % 4] *= 3
        rates[(obs["p"] == label) & (obs["line"] == lines[-1]), 9] *= 4  # the last line responds differently
    obs.index = obs.index.astype(str)
    return anndata.AnnData(sp.csr_matrix(rng.poisson(rates).astype(np.float32)), obs=obs)


def test_a_group_that_is_left_out_has_the_baselines_of_contexts() -> None:
    lines = ["a", "b", "c", "d"]
    cells = screen(["ctrl", "G5", "G6", "other"], lines)
    # Perturbed cells of one line are mostly in one batch: its effect is not that of the batch.
    skewed = cells[~((cells.obs["p"] == "G5") & (cells.obs["line"] == "a") & (cells.obs["batch"] == "x")).to_numpy()]
    columns = Columns("p", "ctrl", strata=["line", "batch"])
    found = rows_of(skewed.copy(), columns, ["line"])
    control = np.asarray(log_cp10k(sp.csr_matrix(cells[(cells.obs["line"] == "d").to_numpy()].X)).mean(0)).ravel()
    rows = found.rows((("G5",), None), np.array([5]), control)
    assert list(rows) == [
        "train mean", "train mean, by cells", "same in training", "latent shift",
        "nearest context", "similar contexts", "ridge on controls", "bilinear on controls",
    ]  # fmt: skip
    for effect in rows.values():
        assert np.abs(effect[10:]).max() < 0.3  # what the batch does, 1.6, is no effect
    assert rows["nearest context"][9] > rows["same in training"][9] + 0.3
    one_line = rows_of(skewed.copy(), columns, ["batch"]).rows((("G5",), None), np.array([5]), control)
    assert "ridge on controls" not in one_line  # two batches
    assert "nearest context" not in rows_of(skewed.copy(), columns, []).rows((("G5",), None), NONE, control)


def test_cells_without_a_context_are_none() -> None:
    cells = screen(["ctrl", "G5", "other"], ["a", "b"])
    cells.obs["line"] = cells.obs["line"].replace({"b": "unknown"})
    found = rows_of(cells, Columns("p", "ctrl", strata=["batch"]), ["line"])
    assert "nearest context" not in found.rows((("G5",), None), NONE, np.zeros(12))


def test_an_unseen_target_has_means_and_gene_sets() -> None:
    labels = ["ctrl", "G5", "G6", "G7", "G8", "A", "B"]
    cells = screen(labels, ["a"])
    columns = Columns("p", "ctrl", strata=["batch"])
    sets = GeneSets({"one": frozenset({"G9", "A", "G5"}), "two": frozenset({"G6", "G7", "B"})})
    rows = rows_of(cells, columns, ["line"], sets).rows((("G9",), None), np.array([9]), np.zeros(12))
    assert list(rows) == ["train mean", "train mean, by cells", "gene sets"]
    own = rows["train mean"][9]
    assert own == rows["gene sets"][9] == pytest.approx(rows["train mean, by cells"][9])
    assert own > 0.5  # here targets go up by themselves
    rows = rows_of(cells, columns, []).rows((("A", "B"), None), NONE, np.zeros(12))
    assert list(rows) == ["train mean", "train mean, by cells", "additive"]


def test_doses_have_the_nearest_and_the_average_and_real_cells() -> None:
    cells = screen(["ctrl", "d"], ["a"], size=60)
    treated = (cells.obs["p"] == "d").to_numpy()
    cells.obs["dose"] = np.where(treated, np.resize([1.0, 10.0, 100.0], cells.n_obs), np.nan)
    columns = Columns("p", "ctrl", "dose")
    held = (("d",), 30.0)
    found = rows_of(cells, columns, [])
    assert list(found.rows(held, NONE, np.zeros(12))) == ["nearest dose", "average dose"]
    pools = found.cells(held)
    assert list(pools) == ["nearest dose", "average dose"]  # one drug: no other perturbation to average
    assert set(cells.obs["dose"].iloc[pools["nearest dose"]]) in ({10.0}, {100.0})
    assert len(pools["average dose"]) == treated.sum()


def test_without_trained_perturbations_there_are_none() -> None:
    cells = screen(["ctrl"], ["a"])
    found = rows_of(cells, Columns("p", "ctrl"), ["line"])
    assert found.rows((("G5",), 1.0), np.array([5]), np.zeros(12)) == {}
    assert found.cells((("G5",), 1.0)) == {}
