"""Simulated screens: realistic counts, effects that depend on the context as the equations say, and a crowd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from bgen.errors import UserError
from data_tools.simulate.screens import SCREENS, perturbed_mean, simulate_screens
from data_tools.simulate.simulate import simulate


@pytest.fixture(scope="module")
def atlas() -> anndata.AnnData:
    return simulate_screens("atlas", cells=6000, genes=200, seed=1)


def folds(cells: anndata.AnnData, label: str, **options: Any) -> np.ndarray:
    """Log fold change of every cell's expected counts by a perturbation."""
    control = perturbed_mean(cells, "control", dose=0.0, time=options.get("time"))
    return np.asarray(np.log(perturbed_mean(cells, label, **options) / control))


@pytest.mark.parametrize("preset", SCREENS)
def test_every_context_has_every_perturbation_and_control_cells(preset: str) -> None:
    size = SCREENS[preset]
    cells = simulate_screens(preset, cells=3000, genes=100)
    table = cells.obs.groupby(["cell_type", "perturbation"], observed=True).size()
    assert len(table) == size.contexts * (size.singles + size.pairs + 1)
    assert cells.X.dtype == np.float32
    assert np.array_equal(cells.X.data, np.rint(cells.X.data))
    control = cells.obs["perturbation"] == "control"
    assert (cells.obs["dose"] == 0).equals(control)
    assert set(cells.obs["time"]) == set(size.times)
    again = simulate_screens(preset, cells=3000, genes=100)
    assert (again.X != cells.X).nnz == 0
    assert (simulate_screens(preset, cells=3000, genes=100, seed=1).X != cells.X).nnz > 0


def test_the_truth_is_the_mean_of_the_counts(atlas: anndata.AnnData) -> None:
    expected = perturbed_mean(atlas)
    np.testing.assert_allclose(expected.sum(1), atlas.obsm["truth"][:, 0])
    z = (np.asarray(atlas.X.sum(0)).ravel() - expected.sum(0)) / np.sqrt(
        (expected + expected**2 / atlas.uns["truth"]["dispersion"]).sum(0)
    )
    assert np.abs(z).max() < 4.5
    assert 0.7 < z.std() < 1.3


def test_effects_are_partly_shared_and_partly_of_the_context(atlas: anndata.AnnData) -> None:
    control = atlas[atlas.obs["perturbation"] == "control"]
    label = atlas.uns["truth"]["label"][0]
    by_context = np.array(
        [folds(control[control.obs["cell_type"] == name], label, dose=3.0, time=24.0).mean(0) for name in
         control.obs["cell_type"].cat.categories]
    )  # fmt: skip
    mean = by_context.mean(0)
    correlation = [np.corrcoef(mean, own)[0, 1] for own in by_context]
    assert 0.4 < np.mean(correlation) < 0.97
    told = np.array(
        [folds(control[control.obs["cell_type"] == name], label, dose=3.0, time=24.0, foreseen=True).mean(0) for name in
         control.obs["cell_type"].cat.categories]
    )  # fmt: skip
    left = ((by_context - told) ** 2).sum() / (by_context**2).sum()
    assert 0.0 < left < 0.5


def test_what_is_foreseen_lacks_what_is_the_contexts_own(atlas: anndata.AnnData) -> None:
    some = atlas[atlas.obs["perturbation"] != "control"][:200].copy()
    whole, foreseen = perturbed_mean(some), perturbed_mean(some, foreseen=True)
    some.uns["truth"]["response"]["own"] = np.zeros_like(some.uns["truth"]["response"]["own"])
    np.testing.assert_array_equal(perturbed_mean(some), foreseen)
    assert not np.allclose(whole, foreseen)


def test_amount_and_time_act_as_they_should(atlas: anndata.AnnData) -> None:
    control = atlas[atlas.obs["perturbation"] == "control"][:200]
    single, pair = atlas.uns["truth"]["label"][0], atlas.uns["truth"]["label"][-1]
    sizes = [np.abs(folds(control, single, dose=dose, time=24.0)).mean() for dose in (0.0, 0.3, 1.0, 3.0)]
    assert sizes[0] == 0
    assert sizes == sorted(sizes)
    sizes = [np.abs(folds(control, single, dose=1.0, time=time)).mean() for time in (2.0, 24.0, 72.0)]
    assert sizes == sorted(sizes)
    names = list(atlas.var_names)
    first, second = pair.split("+")
    assert folds(control, pair, dose=3.0)[:, [names.index(first), names.index(second)]].max() < -0.3
    parts = folds(control, first, dose=1.0, time=24.0).mean(0) + folds(control, second, dose=1.0, time=24.0).mean(0)
    assert np.corrcoef(folds(control, pair, dose=1.0, time=24.0).mean(0), parts)[0, 1] > 0.9


def test_in_a_crowd_only_the_population_tells_the_answer() -> None:
    cells = simulate_screens("crowd", cells=6000, genes=150)
    share = cells.uns["truth"]["context"]["share"]
    control = cells[cells.obs["perturbation"] == "control"]
    label = cells.uns["truth"]["label"][0]
    size = np.array(
        [np.abs(folds(control[control.obs["cell_type"] == name], label, dose=1.0).mean(0)).mean() for name in
         cells.uns["truth"]["context"]["name"]]
    )  # fmt: skip
    assert np.corrcoef(share, size)[0, 1] > 0.95
    code = control.obs["cell_type"].cat.codes.to_numpy()
    state = control.obsm["truth"][:, 1:9]
    axis = cells.uns["truth"]["context"]["aside"][0] / np.linalg.norm(cells.uns["truth"]["context"]["aside"][0])
    along = [(state[code == c] - cells.uns["truth"]["context"]["state"][c]) @ axis for c in range(len(share))]
    means, spreads = (np.array([fn(values) for values in along]) for fn in (np.mean, np.std))
    assert abs(np.corrcoef(share, means)[0, 1]) < 0.5
    assert np.corrcoef(share, spreads)[0, 1] > 0.9
    # and no cell by itself: those in the middle answer as those aside do
    one = control[code == int(np.argmax(share))]
    far = np.abs((one.obsm["truth"][:, 1:9] - cells.uns["truth"]["context"]["state"][int(np.argmax(share))]) @ axis) > 1
    effect = np.abs(folds(one, label, dose=1.0)).mean(1)
    assert effect[far].mean() == pytest.approx(effect[~far].mean(), rel=0.1)


def test_mistakes(bgen: Any, atlas: anndata.AnnData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no preset 'atlsa'\. Did you mean 'atlas'"):
        simulate("atlsa")
    with pytest.raises(UserError, match="too small: 'atlas' needs at least 656 x 60"):
        simulate_screens("atlas", cells=100)
    with pytest.raises(UserError, match="there is no 'G9' in the truth"):
        perturbed_mean(atlas[:5], "G9")
    with pytest.raises(UserError, match="no truth of screens"):
        perturbed_mean(simulate("tiny", cells=100, genes=60))
    done = bgen("data", "simulate", "--preset", "crowd", "--cells", 400, "--genes", 80, "--out", tmp_path / "c.h5ad")
    assert done.code == 0, done
    checked = bgen("data", "check", tmp_path / "c.h5ad")
    assert checked.code == 0, checked
    again = anndata.read_h5ad(tmp_path / "c.h5ad")
    np.testing.assert_array_equal(perturbed_mean(again), perturbed_mean(simulate_screens("crowd", cells=400, genes=80)))
