"""The scale of average effects: sizes that shrinking took away come back, and only where the data can tell."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from bgen.config.perturb import PerturbConfig
from bgen.config.vae import VAEConfig
from bgen.data.cells_in_memory import MemoryCells
from bgen.evaluate.protocols.perturbation import mean_log
from bgen.hub.about import EffectScale
from bgen.models.generators.counterfactual import change_counts
from bgen.models.generators.perturbation_flow import PerturbationFlow
from bgen.models.vae.vae import VAE
from bgen.tasks.perturb import effect_scale as module
from bgen.tasks.perturb.effect_scale import _respond, fit_scale
from bgen.tasks.perturb.effects import Effects, fit_effects
from bgen.tasks.perturb.perturb import anchor
from bgen.tasks.perturb.screen import ScreenData, make_sets
from bgen.train.stages.perturbation_pairs import Screen

GENES, LABELS, CELLS, LIBRARY = 80, 6, 60, 100.0


class World:
    """A screen of cells with few molecules, in which perturbations change most genes a little."""

    def __init__(self, strength: float, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.shares = self.rng.dirichlet(np.full(GENES, 3.0))
        self.effects = strength * self.rng.normal(size=(LABELS, GENES))

    def cells(self, label: int | None, n: int) -> sp.csr_matrix:
        shares = self.shares * np.exp(0 if label is None else self.effects[label])
        return sp.csr_matrix(self.rng.poisson(LIBRARY * shares / shares.sum(), (n, GENES)).astype(np.float32))

    def screen(self, among_genes: int = LABELS) -> ScreenData:
        """All cells; only the first targets are genes."""
        counts = sp.vstack([self.cells(None, 600), *(self.cells(label, CELLS) for label in range(LABELS))], "csr")
        label = np.repeat(np.arange(-1, LABELS), [600, *[CELLS] * LABELS])
        names, targets = (
            [f"p{k}" for k in range(LABELS)],
            np.where(np.arange(LABELS) < among_genes, np.arange(LABELS), -1),
        )
        members, doses = [[name] for name in names], np.full(LABELS, np.nan)
        sets = make_sets(members, doses, names, targets)
        latents = whitened(len(label)).numpy()
        columns = [part.numpy() for part in (sets.known, sets.gene, sets.dose, sets.there)]
        screen = Screen(latents, 0 * latents, label, np.zeros_like(label), *columns)
        labels = pd.DataFrame({"label": names, "dose": doses, "members": members})
        return ScreenData(MemoryCells(counts, {}), screen, labels, names, targets, 1.0)


def whitened(n: int) -> torch.Tensor:
    """Latents of cells that differ in nothing; the last dimension is the logarithm of the library size."""
    latents = torch.zeros(n, VAEConfig().latent + 1)
    latents[:, -1] = np.log(LIBRARY)
    return latents


def fitted(data: ScreenData) -> tuple[PerturbationFlow, Effects]:
    """A flow that carries nobody anywhere, on a decoder that knows nothing: the average effects do everything."""
    torch.manual_seed(0)
    effects = fit_effects(data, data.labels)
    vae = VAE(VAEConfig(), GENES, {})
    vae.decoder.scaled_log_theta.data.fill_(10.0)  # the cells are Poisson
    flow = PerturbationFlow(PerturbConfig(), vae, LABELS, torch.zeros(GENES, 4), 1.0, torch.from_numpy(effects.values))
    return flow, effects


def predicted(flow: PerturbationFlow, control: sp.csr_matrix, effect: np.ndarray) -> sp.csr_matrix:
    """The control cells after an effect, as ``perturb`` predicts them."""
    latents = whitened(control.shape[0])
    ends = [flow.decode(latents, anchor(flow, latents, {}, control, one), {}) for one in (0 * effect, effect)]
    counts = torch.from_numpy(control.toarray())
    return sp.csr_matrix(change_counts(counts, *ends, torch.arange(len(counts))).numpy())


def slope(world: World, flow: PerturbationFlow, effects: Effects, scale: float) -> float:
    """Size of predicted effects on the mean logarithm in units of real ones, each measured on many new cells."""
    control = world.cells(None, 1500)
    base = mean_log(control)
    products, squares = 0.0, 0.0
    for label in range(LABELS):
        real = mean_log(world.cells(label, 1500)) - base
        made = predicted(flow, control, scale * effects.values[label].astype(np.float64))
        products += float((mean_log(made) - base) @ real)
        squares += float(real @ real)
    return products / squares


def test_the_size_that_shrinking_took_comes_back() -> None:
    world = World(0.25)
    data = world.screen()
    flow, effects = fitted(data)
    scale = fit_scale(flow, data, 0)
    assert slope(world, flow, effects, 1.0) < 0.8
    assert slope(world, flow, effects, scale.trained) == pytest.approx(1, abs=0.1)


def test_nothing_is_scaled_where_nothing_happens() -> None:
    data = World(0.0).screen()
    assert fit_scale(fitted(data)[0], data, 0) == EffectScale()


def test_unseen_targets_are_damped_where_the_others_say_nothing_about_them() -> None:
    world = World(0.25)
    data = world.screen()
    assert fit_scale(fitted(data)[0], data, 0).unseen < 0.4
    few = world.screen(among_genes=2)
    assert fit_scale(fitted(few)[0], few, 0).unseen < 0.4
    world.effects += 0.5 * world.rng.normal(size=GENES)  # all alike
    data = world.screen()
    assert fit_scale(fitted(data)[0], data, 0).unseen == pytest.approx(1, abs=0.1)


def test_with_few_targets_among_the_genes_an_unseen_one_is_the_average_of_all() -> None:
    values = np.random.default_rng(0).normal(size=(LABELS, GENES)).astype(np.float32)
    effects = Effects([(f"p{k}",) for k in range(LABELS)], np.full(LABELS, np.nan), values)
    places = {f"p{k}": k if k < 2 else -1 for k in range(LABELS)}
    unseen = effects.unseen(7, np.ones((GENES, 4), np.float32), places)
    others = np.arange(GENES) > 7  # the average without what happens to the targets themselves
    np.testing.assert_allclose(unseen[others], values.mean(0)[others], rtol=1e-5)
    assert unseen[7] == pytest.approx((values[0, 0] + values[1, 1]) / 2)


def test_the_table_answers_as_drawn_cells_do() -> None:
    world = World(0.5)
    data = world.screen()
    flow, effects = fitted(data)
    response = _respond(flow, data, np.random.default_rng(0), known=True)
    control = world.cells(None, 1500)
    for label in range(LABELS):
        effect = effects.values[label].astype(np.float64)
        expected = mean_log(predicted(flow, control, effect)) - mean_log(control)
        found = response.predict(effect).mean(0)
        assert np.corrcoef(found, expected)[0, 1] > 0.98
        assert found @ expected / (expected @ expected) == pytest.approx(1, abs=0.1)


def test_the_size_of_an_effect_is_measured_on_independent_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both predictions hold the real effect and a noise of their own; as large as predicted, it needs no scale."""
    common, one, other = np.eye(3)[0], np.eye(3)[1], np.eye(3)[2]

    class Response:
        def predict(self, effects: Effects) -> tuple[np.ndarray, np.ndarray]:
            return common + one, common + other

    monkeypatch.setattr(module, "_respond", lambda *args, **options: Response())
    world = World(0.0)
    data = world.screen(among_genes=0)
    every = Effects([(name,) for name in data.names], np.full(LABELS, np.nan), np.zeros((LABELS, GENES), np.float32))
    fold = SimpleNamespace(effects=every, rest=[common] * LABELS)
    flow = SimpleNamespace(gene_embedding=torch.zeros(GENES, 1), network=torch.zeros(0, GENES))
    rng = np.random.default_rng(0)
    assert module._unseen(flow, data, [fold] * module.FOLDS, rng) == pytest.approx(1.0)  # type: ignore[arg-type]
