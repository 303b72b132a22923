"""The simulator keeps its promises: realistic counts, and a truth that is exactly what the equations say."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from bgen.errors import UserError
from data_tools.simulate.network import MAX_DOWNSTREAM, RESIDUAL
from data_tools.simulate.simulate import PRESETS, simulate
from data_tools.simulate.truth import CONDITION, counterfactual_mean, expected_proportions, network_of


@pytest.fixture(scope="module")
def demo() -> anndata.AnnData:
    return simulate("demo")


@pytest.fixture(scope="module")
def tiny() -> anndata.AnnData:
    return simulate("tiny", seed=3)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_counts_look_like_droplet_data(preset: str, seed: int) -> None:
    cells = simulate(preset, seed=seed)
    counts = cells.X
    assert cells.shape == (PRESETS[preset].cells, PRESETS[preset].genes)
    assert counts.format == "csr"
    assert counts.dtype == np.float32
    assert np.array_equal(counts.data, np.rint(counts.data))
    assert counts.data.min() > 0
    assert 0.5 < 1 - counts.nnz / np.prod(counts.shape) < 0.7
    library = np.asarray(counts.sum(1)).ravel()
    assert 0.75 < library.std() / library.mean() < 1.4
    assert {"cell_type", "batch", "donor", *CONDITION} <= set(cells.obs)
    assert (cells.obs["dose"][cells.obs["drug"] == "vehicle"] == 0).all()
    assert cells.obs["perturbation"].str.contains("+", regex=False).any()


def test_same_seed_same_cells_other_seed_others() -> None:
    a, b, c = simulate("tiny", seed=5), simulate("tiny", seed=5), simulate("tiny", seed=6)
    assert (a.X != b.X).nnz == 0
    assert a.obs.equals(b.obs)
    assert (a.X != c.X).nnz > 0


def test_genes_do_not_depend_on_the_number_of_cells() -> None:
    few, many = simulate("tiny", cells=200), simulate("tiny", cells=300)
    for key in ("source", "target", "weight"):
        assert np.array_equal(few.uns["truth"]["network"][key], many.uns["truth"]["network"][key])


def test_network_is_acyclic_and_small_downstream(demo: anndata.AnnData) -> None:
    network = network_of(demo.uns["truth"])
    order = np.full(network.n_genes, network.n_genes)
    order[network.regulators] = np.arange(len(network.regulators))
    assert np.isin(network.source, network.regulators).all()
    assert (order[network.source] < order[network.target]).all()
    assert max(len(network.descendants(gene)) for gene in network.regulators) <= MAX_DOWNSTREAM


def _solve_by_loops(adata: anndata.AnnData, log_rate: np.ndarray, knocked: set[int]) -> np.ndarray:
    """The structural equations one gene at a time, from the log rates of the untreated cell."""
    net = network_of(adata.uns["truth"])
    inputs = log_rate.copy()
    half = dict(zip(net.regulators.tolist(), net.half_saturation.tolist(), strict=True))
    edges = list(zip(net.source.tolist(), net.target.tolist(), net.weight.tolist(), strict=True))

    def activity(x: np.ndarray, gene: int, out: set[int]) -> float:
        return 0.0 if gene in out else float(np.exp(x[gene]) / (np.exp(x[gene]) + half[gene]))

    for source, target, weight in edges:  # back to u
        inputs[target] -= weight * (activity(log_rate, source, set()) - 0.5)
    x = inputs.copy()
    for gene in [*net.regulators.tolist(), *[g for g in range(net.n_genes) if g not in half]]:
        x[gene] = inputs[gene] + sum(w * (activity(x, s, knocked) - 0.5) for s, t, w in edges if t == gene)
        if gene in knocked:
            x[gene] += np.log(RESIDUAL)
    return x


def test_knockout_is_exactly_what_the_equations_say(tiny: anndata.AnnData) -> None:
    truth, genes = tiny.uns["truth"], tiny.var_names
    network = network_of(truth)
    labels = [label for label in tiny.obs["perturbation"].cat.categories if label != "control"]
    assert any("+" in label for label in labels)
    state = pd.DataFrame({"cell_type": ["B"], "time": [48.0], "drug": ["vehicle"], "dose": [0.0]})
    control = expected_proportions(truth, state.assign(perturbation="control"), genes)[0]
    assert control.sum() == pytest.approx(1)
    tree = truth["tree"]
    code = list(tree["cell_type"]).index("B")
    inputs = truth["base"] + tree["shift"][0] + tree["shift"][code]
    log_rate = network.solve(inputs[None], np.zeros((1, network.n_genes), dtype=bool))[0]
    for label in labels:
        knocked = {int(genes.get_loc(gene)) for gene in label.split("+")}
        changed = expected_proportions(truth, state.assign(perturbation=label), genes)[0]
        expected = control * np.exp(_solve_by_loops(tiny, log_rate, knocked) - log_rate)
        np.testing.assert_allclose(changed, expected, rtol=1e-10)
        downstream = set().union(*(network.descendants(gene).tolist() for gene in knocked)) | knocked
        untouched = np.setdiff1d(np.arange(network.n_genes), sorted(downstream))
        assert np.array_equal(changed[untouched], control[untouched])
        assert (changed[sorted(downstream)] != control[sorted(downstream)]).all()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_knockout_changes_1_to_40_genes(seed: int) -> None:
    cells = simulate("demo", seed=seed)
    control = counterfactual_mean(cells, "control", drug="vehicle", dose=0.0).mean(0)
    for label in cells.obs["perturbation"].cat.categories:
        if label != "control" and "+" not in label:
            mean = counterfactual_mean(cells, label, drug="vehicle", dose=0.0).mean(0)
            assert 1 <= (np.abs(np.log2(mean / control)) > 0.25).sum() <= 40


def test_counts_have_the_mean_and_dispersion_of_the_truth(demo: anndata.AnnData) -> None:
    counts, mean = demo.X.toarray().astype(np.float64), counterfactual_mean(demo)
    theta = demo.uns["truth"]["dispersion"]
    # Sum of counts over cells: variance is the sum of the cells' NB variances.
    score = (counts.sum(0) - mean.sum(0)) / np.sqrt((mean + mean**2 / theta).sum(0))
    assert np.abs(score).max() < 4.5
    assert 0.8 < score.std() < 1.2
    np.testing.assert_allclose(demo.uns["truth"]["gene_mean"], mean.mean(0))
    # E[(y - mu)^2 - mu] = mu^2 / theta, weighted by 1 / mu^2 so that no few cells dominate.
    weight = 1 / (mean**2 / theta + mean) ** 2
    estimate = (weight * mean**4).sum(0) / (weight * mean**2 * ((counts - mean) ** 2 - mean)).sum(0)
    well_seen = mean.mean(0) > 1
    assert well_seen.sum() > 50
    assert np.median(estimate[well_seen] / theta[well_seen]) == pytest.approx(1, abs=0.1)
    assert np.corrcoef(np.log(estimate[well_seen]), np.log(theta[well_seen]))[0, 1] > 0.9


def test_stored_conditions_are_those_of_the_cells(demo: anndata.AnnData) -> None:
    stored = demo.uns["truth"]["conditions"]
    table = pd.DataFrame({key: value for key, value in stored.items() if key != "proportions"})
    assert table["cells"].sum() == demo.n_obs
    assert not table.duplicated(CONDITION).any()
    again = expected_proportions(demo.uns["truth"], table, demo.var_names)
    np.testing.assert_allclose(stored["proportions"], again)


def test_dose_response_grows_with_the_dose(demo: anndata.AnnData) -> None:
    some = demo[:50]
    vehicle = counterfactual_mean(some, "control", drug="vehicle", dose=0.0)
    size = [
        np.abs(np.log(counterfactual_mean(some, "control", drug="drug_A", dose=dose) / vehicle)).max()
        for dose in (0.0, 0.1, 1.0, 10.0)
    ]
    assert size[0] == 0
    assert size == sorted(size)
    assert size[-1] > 0.5


def test_truth_survives_h5ad_and_subsetting(tiny: anndata.AnnData, tmp_path: Path) -> None:
    tiny.write_h5ad(tmp_path / "tiny.h5ad")
    back = anndata.read_h5ad(tmp_path / "tiny.h5ad")
    assert (back.X != tiny.X).nnz == 0
    label = str(tiny.obs["perturbation"].iloc[np.flatnonzero(tiny.obs["perturbation"] != "control")[0]])
    expected = counterfactual_mean(tiny, label)
    np.testing.assert_array_equal(counterfactual_mean(back, label), expected)
    some = np.arange(0, tiny.n_obs, 7)
    np.testing.assert_array_equal(counterfactual_mean(back[some], label), expected[some])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preset": "demmo"}, "Did you mean 'demo'"),
        ({"cells": 3}, "at least 100 x 60"),
        ({"seed": -1}, "seed"),
    ],
)
def test_mistakes_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        simulate(**arguments)


def test_unknown_counterfactuals_are_named(tiny: anndata.AnnData) -> None:
    with pytest.raises(UserError, match="there is no gene 'G99999'"):
        counterfactual_mean(tiny, "G99999")
    with pytest.raises(UserError, match="there is no drug 'aspirin'"):
        counterfactual_mean(tiny, drug="aspirin", dose=1.0)
    with pytest.raises(UserError, match="keep all"):
        counterfactual_mean(tiny[:, :50])
