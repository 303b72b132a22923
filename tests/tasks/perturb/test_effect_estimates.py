"""Average effects: right on average, and shrunk by as much as their size among all genes tells."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from bgen.tasks.perturb.effect_estimates import raw_effects, shrink
from data_tools.simulate.simulate import simulate
from data_tools.simulate.truth import counterfactual_mean


def screen(rng: np.random.Generator, effect: np.ndarray, n: int = 400) -> tuple[sp.csr_matrix, np.ndarray]:
    """Controls then perturbed cells; two strata of which the perturbed cells come in another share."""
    profiles = rng.dirichlet(np.full(len(effect), 2.0), 2)
    stratum = np.concatenate([rng.random(n) < 0.3, rng.random(n) < 0.7]).astype(np.int64)
    shares = profiles[stratum]
    shares[n:] *= np.exp(effect)
    library = rng.uniform(500, 3000, 2 * n)
    return sp.csr_matrix(rng.poisson(library[:, None] * shares).astype(np.float32)), stratum


def test_effects_are_compared_within_strata() -> None:
    rng = np.random.default_rng(0)
    effect = np.zeros(100)
    effect[:5] = [1.0, -1.0, 0.5, -0.5, 0.3]
    counts, stratum = screen(rng, effect)
    control, perturbed = np.arange(400), np.arange(400, 800)
    within, error = raw_effects(counts, perturbed, control, stratum)
    across, _ = raw_effects(counts, perturbed, control, np.zeros(800, np.int64))
    # The total is scaled to one, so all genes share a small shift.
    assert np.abs(within - effect).mean() < 0.5 * np.abs(across - effect).mean()
    z = (within - effect)[5:] / error[5:]
    assert z.std() == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("differ", [0.0, 2.0])
def test_standard_errors_leave_out_what_differs_between_strata(differ: float) -> None:
    """Stated over true standard errors, median over genes, whatever the logarithms of two strata differ by."""
    rng = np.random.default_rng(0)
    base = rng.dirichlet(np.full(60, 3.0))
    profiles = np.stack([base, base * np.exp(differ * rng.normal(size=60))])
    profiles /= profiles.sum(1, keepdims=True)
    stratum = np.r_[np.repeat([0, 1], [66, 134]), np.repeat([0, 1], [100, 100])]
    estimates, errors = [], []
    for _ in range(60):
        library = rng.uniform(500, 3000, 400)
        counts = sp.csr_matrix(rng.poisson(library[:, None] * profiles[stratum]).astype(np.float32))
        estimate, error = raw_effects(counts, np.arange(200), np.arange(200, 400), stratum)
        estimates.append(estimate)
        errors.append(error)
    ratio = np.median(np.mean(errors, axis=0) / np.std(estimates, axis=0))
    assert ratio == pytest.approx(1, abs=0.1)


def test_a_stratum_with_one_cell_is_no_more_certain_than_others() -> None:
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(5, (60, 20)).astype(np.float32))
    stratum = np.zeros(60, np.int64)
    control = np.arange(30, 60)
    _, together = raw_effects(counts, np.arange(30), control, stratum)
    alone = stratum.copy()
    alone[:30] = np.arange(30)
    _, apart = raw_effects(counts, np.arange(30), control, alone)
    assert np.median(apart / together) == pytest.approx(1, abs=0.1)


def test_standard_errors_hold_the_noise_of_few_controls() -> None:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(30, 5.0))
    estimates, errors = [], []
    for _ in range(80):
        counts = sp.csr_matrix(rng.poisson(2000 * shares, (420, 30)).astype(np.float32))
        estimate, error = raw_effects(counts, np.arange(20, 420), np.arange(20), np.zeros(420, np.int64))
        estimates.append(estimate)
        errors.append(error)
    assert np.median(np.mean(errors, axis=0) / np.std(estimates, axis=0)) == pytest.approx(1, abs=0.1)


def test_one_gene_alone_is_no_evidence_that_genes_respond() -> None:
    (kept,) = shrink(np.array([0.2]), np.array([0.1]))
    assert kept < 0.6 * 0.2  # without the cell of evidence for no effect: 0.75
    several = shrink(np.full(50, 0.2), np.full(50, 0.1))
    assert several.mean() > 0.7 * 0.2


def test_few_effects_are_kept_and_noise_goes() -> None:
    rng = np.random.default_rng(1)
    truth = np.zeros(1000)
    truth[:10] = rng.choice([-1.0, 1.0], 10)
    error = np.full(1000, 0.1)
    estimate = truth + 0.1 * rng.normal(size=1000)
    kept = shrink(estimate, error)
    assert np.abs(kept[:10] - truth[:10]).max() < 0.25
    assert np.abs(kept[10:]).mean() < 0.1 * np.abs(estimate[10:]).mean()


def test_where_all_genes_respond_little_is_shrunk() -> None:
    rng = np.random.default_rng(2)
    truth = rng.normal(size=1000)
    kept = shrink(truth + 0.1 * rng.normal(size=1000), np.full(1000, 0.1))
    assert np.polyfit(truth, kept, 1)[0] == pytest.approx(1 / 1.01, abs=0.03)


def test_sums_of_shrunken_effects_predict_unseen_combinations_better_than_sums_of_raw_ones() -> None:
    cells = simulate("demo", cells=3000, seed=1)
    cells = cells[(cells.obs["drug"] == "vehicle").to_numpy()].copy()
    label = cells.obs["perturbation"].astype(str).to_numpy()
    control = np.flatnonzero(label == "control")
    stratum = np.asarray(cells.obs.groupby(["cell_type", "time"], observed=True).ngroup())
    counts = sp.csr_matrix(cells.X)
    pairs = sorted({name for name in label if "+" in name})
    raw, kept = {}, {}
    for name in {part for pair in pairs for part in pair.split("+")}:
        raw[name], error = raw_effects(counts, np.flatnonzero(label == name), control, stratum)
        kept[name] = shrink(raw[name], error)
    some = cells[control[:300]].copy()
    before = counterfactual_mean(some, "control").mean(0)
    correlations = []
    for pair in pairs:
        truth = np.log(counterfactual_mean(some, pair).mean(0) / before)
        sums = [sum(effects[part] for part in pair.split("+")) for effects in (kept, raw)]
        correlations.append([np.corrcoef(truth, total)[0, 1] for total in sums])
    shrunken, additive = np.mean(correlations, axis=0)
    assert shrunken > additive + 0.1
