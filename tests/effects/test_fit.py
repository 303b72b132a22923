"""Average effects from groups of cells: right on average and in their errors, pooled where contexts agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from bgen.effects.context_pool import Controls, controls_of
from bgen.effects.effects import Effects, Known
from bgen.effects.fit import Estimates, fit_effects, measure
from bgen.effects.moments import moments_of
from data_tools.simulate.simulate import simulate
from data_tools.simulate.truth import counterfactual_mean

GENES = 100
NONE = np.array([np.nan])


class Atlas:
    """Contexts of control cells and of cells in which labels add to log(1 + counts per 10,000).

    One more gene, the last, holds all other molecules.
    """

    def __init__(self, seed: int, contexts: int, labels: int, spread: float = 0.5) -> None:
        self.rng = np.random.default_rng(seed)
        self.base = np.log1p(2e3 * self.rng.dirichlet(np.full(GENES, 3.0)))
        self.state = self.rng.normal(size=contexts)
        self.axis = spread * self.rng.normal(size=GENES)
        self.effects = np.zeros((contexts, labels, GENES))

    def logs(self, context: int, label: int) -> np.ndarray:
        logs = self.base + self.state[context] * self.axis
        return logs if label < 0 else logs + self.effects[context, label]

    def cells(self, context: int, label: int, n: int) -> sp.csr_matrix:
        rate = np.maximum(np.expm1(self.logs(context, label)), 0)
        rate = np.append(rate, max(1e4 - rate.sum(), 0))
        library = self.rng.uniform(1000, 6000, n)
        return sp.csr_matrix(self.rng.poisson(library[:, None] * rate / rate.sum()).astype(np.float32))

    def fit(self, sets: list[tuple[str, ...]], n: int = 60, **options: Known) -> Effects:
        contexts, labels = self.effects.shape[:2]
        groups = [(context, label) for context in range(contexts) for label in range(-1, labels)]
        counts = sp.vstack([self.cells(*group, 2 * n if group[1] < 0 else n) for group in groups], "csr")
        sizes = [2 * n if label < 0 else n for _, label in groups]
        context, label = (np.repeat([group[at] for group in groups], sizes) for at in (0, 1))
        return fit_effects(moments_of(counts, context, label), sets, np.full(labels, np.nan), **options)


def estimates(counts: sp.csr_matrix, context: np.ndarray, label: np.ndarray) -> Estimates:
    return measure(moments_of(counts, context, label))[0]


def test_effects_are_compared_within_contexts() -> None:
    atlas = Atlas(0, 2, 1)
    atlas.effects[:, 0, :5] = [1.0, -1.0, 0.5, -0.5, 0.3]
    sizes = {(0, -1): 120, (0, 0): 280, (1, -1): 280, (1, 0): 120}
    counts = sp.vstack([atlas.cells(*group, n) for group, n in sizes.items()], "csr")
    context, label = (np.repeat([group[at] for group in sizes], list(sizes.values())) for at in (0, 1))
    found = estimates(counts, context, label)
    across = estimates(counts, np.zeros_like(context), label)
    off = found.effect[:, :-1] - atlas.effects[:, 0]
    assert np.abs(off).mean() < 0.5 * np.abs(across.effect[0, :-1] - atlas.effects[0, 0]).mean()
    assert (off / np.sqrt(found.variance[:, :-1])).std() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(("controls", "perturbed"), [(20, 400), (400, 20), (200, 200)])
def test_standard_errors_are_those_of_repeated_screens(controls: int, perturbed: int) -> None:
    atlas = Atlas(1, 1, 1)
    label = np.repeat([-1, 0], [controls, perturbed])
    measured = []
    for _ in range(60):
        counts = sp.vstack([atlas.cells(0, -1, controls), atlas.cells(0, 0, perturbed)], "csr")
        measured.append(estimates(counts, np.zeros_like(label), label))
    errors = np.mean([np.sqrt(one.variance[0]) for one in measured], axis=0)
    assert np.median(errors / np.std([one.effect[0] for one in measured], axis=0)) == pytest.approx(1, abs=0.1)


def test_a_context_without_controls_is_compared_with_all() -> None:
    atlas = Atlas(2, 2, 1, spread=0.0)
    counts = sp.vstack([atlas.cells(0, -1, 200), atlas.cells(0, 0, 80), atlas.cells(1, 0, 80)], "csr")
    context, label = np.repeat([0, 0, 1], [200, 80, 80]), np.repeat([-1, 0, 0], [200, 80, 80])
    found, pool, numbers = measure(moments_of(counts, context, label))
    assert found.context.tolist() == [0, -1]
    assert (numbers, len(pool.logs)) == ([0], 1)
    assert np.abs(found.effect[1]).mean() < 2 * np.abs(found.effect[0]).mean()


def test_a_screen_whose_controls_are_all_elsewhere_has_general_effects_only() -> None:
    atlas = Atlas(2, 2, 1, spread=0.0)
    atlas.effects[:, 0, :30] = 1.0
    counts = sp.vstack([atlas.cells(0, -1, 200), atlas.cells(1, 0, 150)], "csr")
    moments = moments_of(counts, np.repeat([0, 1], [200, 150]), np.repeat([-1, 0], [200, 150]))
    effects = fit_effects(moments, [("a",)], NONE)
    found = effects.of(["a"], None, controls_of(counts[:200]))
    assert found.tolist() == effects.of(["a"], None).tolist()
    assert found[:30].mean() == pytest.approx(1, abs=0.1)
    assert effects.tables().control.shape == (0, GENES + 1)


def test_contexts_that_agree_are_pooled_and_others_keep_their_own() -> None:
    alike, apart = Atlas(3, 4, 1), Atlas(3, 4, 1)
    common = np.where(np.arange(GENES) < 20, 0.6, 0.0)
    alike.effects[:] = apart.effects[:] = common
    apart.effects[:, 0, 20:40] += np.random.default_rng(0).choice([-0.6, 0.6], (4, 20))
    pooled, own = (one.fit([("a",)]) for one in (alike, apart))
    assert np.abs(pooled.own).mean() < 0.2 * np.abs(own.own).mean()
    assert np.corrcoef(own.own[2, 20:40], apart.effects[2, 0, 20:40] - apart.effects[:, 0, 20:40].mean(0))[0, 1] > 0.8
    assert np.abs(pooled.general[0, 20:-1]).mean() < 0.05


def test_contexts_count_by_their_likeness_where_that_tells_how_they_respond() -> None:
    """Effects follow the control state, or have nothing to do with it."""
    rng = np.random.default_rng(4)
    wide, narrow = Atlas(4, 6, 3), Atlas(4, 6, 3)
    for atlas in (wide, narrow):
        atlas.state = np.repeat([-1.5, 1.5], 3) + 0.1 * rng.normal(size=6)
    own = 0.6 * rng.normal(size=(2, 3, GENES)) * (rng.random(GENES) < 0.3)
    narrow.effects[:] = own[np.repeat([0, 1], 3)]
    wide.effects[:] = own[0]
    alike, chosen = wide.fit([("a",), ("b",), ("c",)]), narrow.fit([("a",), ("b",), ("c",)])
    assert chosen.pool.width < np.median(chosen.pool.between())
    assert alike.pool.width > 2 * chosen.pool.width
    narrow.state = np.append(narrow.state, 1.6)
    narrow.effects = np.concatenate([narrow.effects, narrow.effects[-1:]])
    strange = controls_of(narrow.cells(6, -1, 200))
    assert np.corrcoef(chosen.of(["b"], None, strange)[:-1], own[1, 1])[0, 1] > 0.9


def test_the_bilinear_form_is_used_where_effects_follow_the_control_state() -> None:
    rng = np.random.default_rng(5)
    atlas, none = Atlas(5, 9, 5), Atlas(5, 9, 5)
    own = 0.5 * rng.normal(size=(5, GENES)) * (rng.random(GENES) < 0.4)
    turn = rng.normal(size=(GENES, GENES)) / GENES**0.5
    atlas.effects = own + 0.6 * atlas.state[:, None, None] * (own @ turn)
    none.effects[:] = own
    sets = [(name,) for name in "abcde"]
    used = atlas.fit(sets)
    assert used.pooling.bilinear > 0
    assert none.fit(sets).pooling.bilinear == 0
    assert used.feature_axes.shape == (used.pooling.features, GENES + 1)
    atlas.state = np.append(atlas.state, 1.0)
    expected = own[2] + 0.6 * own[2] @ turn
    without = replace(used, pooling=used.pooling.model_copy(update={"bilinear": 0.0}))
    strange = controls_of(atlas.cells(9, -1, 400))
    off = [np.square(one.of(["c"], None, strange)[:-1] - expected).mean() for one in (used, without)]
    assert off[0] < off[1]


@pytest.mark.parametrize(("pairs", "expected"), [(5, 0.6), (2, 1.0)])
def test_the_factor_of_pairs_is_fitted_to_pairs(pairs: int, expected: float) -> None:
    atlas = Atlas(6, 1, 6 + pairs)
    atlas.effects[0, :6] = 0.7 * atlas.rng.normal(size=(6, GENES)) * (atlas.rng.random((6, GENES)) < 0.3)
    members = [(at, (at + 1) % 6) for at in range(pairs)]
    for number, (one, other) in enumerate(members):
        atlas.effects[0, 6 + number] = 0.6 * (atlas.effects[0, one] + atlas.effects[0, other])
    sets = [(f"p{at}",) for at in range(6)] + [tuple(sorted(f"p{at}" for at in pair)) for pair in members]
    assert atlas.fit(sets, 150).pooling.pairs == pytest.approx(expected, abs=0.12)


def test_the_sampling_error_of_the_control_cells_is_not_predicted_along() -> None:
    """Nothing happens in most genes, so all perturbed cells together tell what few control cells really are."""
    atlas = Atlas(7, 1, 6)
    atlas.effects[0, :, :5] = 1.0
    counts = [atlas.cells(0, -1, 25), *(atlas.cells(0, label, 60) for label in range(6))]
    sizes = [part.shape[0] for part in counts]
    moments = moments_of(sp.vstack(counts, "csr"), np.zeros(sum(sizes), np.int64), np.repeat(np.arange(-1, 6), sizes))
    effects = fit_effects(moments, [(f"p{at}",) for at in range(6)], np.full(6, np.nan))
    truth = atlas.logs(0, 2)
    same, other = (controls_of(part) for part in (counts[0], atlas.cells(0, -1, 25)))
    plain = replace(effects, pool=replace(effects.pool, off=np.zeros_like(effects.pool.off)))

    def off(asked: Effects, cells: Controls) -> float:
        predicted = cells.logs + asked.of(["p2"], None, cells)
        return float(np.square(predicted[:-1] - truth).mean())

    assert off(effects, same) < 0.5 * off(plain, same)
    assert off(effects, other) == pytest.approx(off(plain, other), rel=0.25)


def test_the_fold_of_targets_of_their_own_perturbation_is_known() -> None:
    atlas = Atlas(8, 1, 4)
    for label in range(4):
        atlas.effects[0, label, label] = np.log1p(0.2 * np.expm1(atlas.base[label])) - atlas.base[label]
    members = Known(targets={f"p{at}": at for at in range(4)})
    found = atlas.fit([(f"p{at}",) for at in range(4)], 200, members=members).pooling.knock_down
    assert found == pytest.approx(np.log(0.2), abs=0.4)
    assert atlas.fit([(f"p{at}",) for at in range(4)]).pooling.knock_down is None


def test_sums_of_shrunken_effects_predict_unseen_combinations_better_than_sums_of_raw_ones() -> None:
    cells = simulate("demo", cells=3000, seed=1)
    cells = cells[(cells.obs["drug"] == "vehicle").to_numpy()].copy()
    label = cells.obs["perturbation"].astype(str).to_numpy()
    names = sorted({part for name in label for part in name.split("+")} - {"control"})
    pairs = sorted({name for name in label if "+" in name})
    number = np.array(
        [-1 if name == "control" else names.index(name) if name in names else len(names) for name in label]
    )
    some = number < len(names)
    stratum = np.asarray(cells.obs.groupby(["cell_type", "time"], observed=True).ngroup())
    moments = moments_of(sp.csr_matrix(cells.X)[some], stratum[some], number[some])
    found = measure(moments)[0]
    effects = fit_effects(moments, [(name,) for name in names], np.full(len(names), np.nan))
    controls = cells[np.flatnonzero(label == "control")[:300]].copy()
    before = np.log1p(1e4 * share(counterfactual_mean(controls, "control")))
    raw = {}
    for row, name in enumerate(names):
        at = np.flatnonzero(found.row == row)
        raw[name] = found.weight[at] / found.weight[at].sum() @ found.effect[at]
    correlations = []
    for pair in pairs:
        truth = np.log1p(1e4 * share(counterfactual_mean(controls, pair))) - before
        sums = effects.of(pair.split("+"), None), sum(raw[part] for part in pair.split("+"))
        correlations.append([np.corrcoef(truth, total)[0, 1] for total in sums])
    shrunken, additive = np.mean(correlations, axis=0)
    assert shrunken > additive + 0.05


def share(means: np.ndarray) -> np.ndarray:
    return means.mean(0) / means.mean(0).sum()
