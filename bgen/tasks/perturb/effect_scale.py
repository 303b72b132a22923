"""Calibrate effect sizes on held-out training cells: two factors by which average effects are multiplied.

Shrinking brings estimates of effects closer to the truth gene by gene, but makes them too small as a whole. And a
decoder with the right average share of a gene can still have its average logarithm wrong. Both show when effects are
fitted to a part of the cells and their predictions are compared with the rest:

- trained perturbations: sum <r', r> / sum <p, r>, where p is the predicted and r' the measured effect of the part, and
  r that of the rest, all as differences of mean log(1 + counts per 10,000). The noise of r' and r is independent, so
  scaled predictions are as large as effects really are.
- unseen targets: sum <p, r> / sum <p, p'>, where p is predicted from the other targets and p' is the same with other
  noise. This is least squares: most of an unseen effect cannot be known, and predicting its full size would lead
  further away.

Sums go over genes, folds and perturbations. A ratio is shrunk towards 1 by its error between perturbations. Both are 1
where perturbations do nothing that can be seen, that is, where their effects r' and r in different cells do not agree.

The decoder's response to an effect is needed for every label, fold and round. It is read from a table of how the mean
logarithm of each gene responds to a change of its share, which is drawn once (:class:`_Response`): with 20,000 genes in
a minute or less.

Axes: N cells, G genes, L labels that are looked at, K changes of a share, D latent size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from bgen.arrays import F64
from bgen.data.cells_in_memory import MemoryCells
from bgen.evaluate.metrics.space import TARGET_SUM, log_cp10k
from bgen.hub.about import EffectScale
from bgen.models.generators.counterfactual import change_counts
from bgen.models.generators.perturbation_flow import PerturbationFlow, PerturbationSet
from bgen.models.likelihoods.negative_binomial import NegativeBinomial
from bgen.tasks.perturb.effect_estimates import control_weights, log_effect
from bgen.tasks.perturb.effects import LEAST_TARGETS, Effects, fit_effects
from bgen.tasks.perturb.perturb import STEPS, anchor
from bgen.tasks.perturb.screen import ScreenData

FOLDS = 5
LABELS = 30
LEAST_CELLS = 20
"""Cells that a label must have to be looked at."""

CONTROLS = 5000
SOURCES = 400
"""Control cells that predictions start from, over all labels together."""

TOGETHER = 10
"""Cells drawn at a time, so few that with many genes the work stays in the caches."""

SHIFTS = np.array([-4, -2, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 2])
"""Changes of shares in the table, as natural logarithms."""

ROUNDS = 2
"""Rounds of measuring: mean logarithms do not grow in proportion to logarithms of means, so the ratio is measured again
at the scale that it led to.
"""

LEAST_LABELS = 3
SURE = 3.0
"""Standard errors above which an effect counts as present."""

AGREE = 2.0
"""Standard errors, between labels, above which effects in different cells count as agreeing."""

LIMITS = (0.5, 2.0)


@dataclass(frozen=True)
class _Response:
    """How the mean logarithm of each gene responds to a change of its share.

    ``share [G]`` is that of the average control cell. ``change [2, K, G]`` is the change of the mean logarithm from
    control cells to decoded ones, after the flow has carried them over and shares have changed by :data:`SHIFTS`; for
    two sets of cells with independent noise.
    """

    share: F64
    change: F64

    def predict(self, effect: F64) -> F64:
        """Turn an effect ``[G]`` on the logarithm of the mean into effects ``[2, G]`` on the mean logarithm."""
        shift = effect - np.log(self.share @ np.exp(effect))  # shares add up to 1
        above = np.clip(np.searchsorted(SHIFTS, shift), 1, len(SHIFTS) - 1)
        part = np.maximum(0, (shift - SHIFTS[above - 1]) / (SHIFTS[above] - SHIFTS[above - 1]))
        genes = np.arange(len(shift))
        predicted: F64 = (1 - part) * self.change[:, above - 1, genes] + part * self.change[:, above, genes]
        return predicted


@dataclass(frozen=True)
class _Fold:
    """Effects fitted to a part of the cells, and the effects ``[L, G]`` measured in that part and in the rest."""

    effects: Effects
    part: F64
    rest: F64


def fit_scale(flow: PerturbationFlow, data: ScreenData, seed: int) -> EffectScale:
    """Return the scales for the effects of a trained flow; 1 where there is too little to tell."""
    rng = np.random.default_rng([seed, 5])
    some = _choose(data, rng)
    labels = range(len(some.labels))
    fold = rng.integers(FOLDS, size=len(some.screen.label))
    logs = log_cp10k(some.cells.counts)
    folds = [_fold(some, logs, np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(FOLDS)]
    real = np.array([[one.part[label] @ one.rest[label] for one in folds] for label in labels])
    if not _agree(real):
        return EffectScale()
    response = _respond(flow, some, rng, known=True)
    trained, error = 1.0, 0.0
    for _ in range(ROUNDS):
        predicted = np.zeros_like(real)
        for label in labels:
            for number, one in enumerate(folds):
                effect = trained * one.effects.values[label].astype(np.float64)
                predicted[label, number] = response.predict(effect).mean(0) @ one.rest[label]
        ratio, error = _ratio(real, predicted)
        error *= trained
        trained = float(np.clip(trained * ratio, *LIMITS))
    return EffectScale(trained=_towards_one(trained, error), unseen=_unseen(flow, some, folds, rng))


def _unseen(flow: PerturbationFlow, data: ScreenData, folds: list[_Fold], rng: np.random.Generator) -> float:
    """Return the scale for targets that were not trained on, by leaving each one out in turn."""
    places = dict(zip(data.names, data.targets.tolist(), strict=True))
    targets = [places[names[0]] for names in data.labels["members"]]
    labels = [row for row, target in enumerate(targets) if target >= 0]
    if len(labels) < LEAST_TARGETS:  # then the others say nothing but their average
        labels = list(range(len(targets)))
    if len(labels) < LEAST_LABELS or data.labels["dose"].notna().any():
        return 1.0
    response = _respond(flow, data, rng, known=False)
    rows, network = flow.gene_embedding.numpy(), flow.network.numpy()
    fits, sizes = np.zeros((2, len(labels), FOLDS))
    for at, label in enumerate(labels):
        for number, one in enumerate(folds):
            effect = replace(one.effects.without(label), network=network).unseen(targets[label], rows, places)
            first, second = response.predict(effect)
            fits[at, number] = (first + second) @ one.rest[label] / 2
            sizes[at, number] = first @ second
    ratio, error = _ratio(fits, sizes)
    return _towards_one(float(np.clip(ratio, 0.0, LIMITS[1])), error)


def _agree(products: F64) -> bool:
    """Whether products ``[L, FOLDS]`` of effects in different cells are above 0 in more labels than by chance.

    Roots are compared, so that a few strong perturbations do not hide many weak ones.
    """
    if len(products) < 2:
        return False
    mean = products.mean(1)
    roots = np.sign(mean) * np.sqrt(np.abs(mean))
    return bool(roots.sum() > AGREE * _error(roots - roots.mean()))


def _ratio(over: F64, under: F64) -> tuple[float, float]:
    """Return the ratio of the sums of numbers ``[L, FOLDS]``, and its standard error.

    The error is that between labels or that between folds, whichever is larger, since all labels share the noise of the
    controls. The result is 1 and 0 if the folds do not agree that ``under`` is above 0.
    """
    size = float(under.sum())
    if len(under) < 2 or size < SURE * _error(under.sum(0) - size / FOLDS):
        return 1.0, 0.0
    ratio = float(over.sum()) / size
    off = over - ratio * under
    return ratio, max(_error(off.sum(0)), _error(off.sum(1))) / size


def _error(deviations: F64) -> float:
    """Return the standard error of a sum from the deviations of its terms from their mean."""
    n = len(deviations)
    return float(np.sqrt(n / (n - 1) * (deviations**2).sum()))


def _towards_one(ratio: float, error: float) -> float:
    """Shrink a ratio by its error: one that may as well be 1 becomes 1."""
    away = ratio - 1
    return 1 + away * max(0.0, 1 - error**2 / max(away**2, 1e-12))


def _choose(data: ScreenData, rng: np.random.Generator) -> ScreenData:
    """Return the cells of some controls and of random single perturbations, each at all its doses."""
    label = data.screen.label
    large = np.bincount(label[label >= 0], minlength=len(data.labels)) >= LEAST_CELLS
    rows_of: dict[str, list[int]] = {}
    for row, names in enumerate(data.labels["members"]):
        if len(names) == 1 and large[row]:
            rows_of.setdefault(names[0], []).append(row)
    chosen: list[int] = []
    for at in rng.permutation(len(rows_of)):
        if len(chosen) < LABELS:
            chosen += list(rows_of.values())[at]
    control = rng.permutation(np.flatnonzero(label < 0))[:CONTROLS]
    kept = np.sort(np.concatenate([control, np.flatnonzero(np.isin(label, chosen))]))
    number = np.full(len(data.labels) + 1, -1)  # the last place is that of controls, numbered -1
    number[chosen] = np.arange(len(chosen))
    taken = _take(data, kept)
    screen = replace(
        taken.screen,
        label=number[taken.screen.label],
        known=data.screen.known[chosen],
        gene=data.screen.gene[chosen],
        dose=data.screen.dose[chosen],
        there=data.screen.there[chosen],
    )
    return replace(taken, screen=screen, labels=data.labels.iloc[chosen].reset_index(drop=True))


def _take(data: ScreenData, rows: NDArray[np.int64]) -> ScreenData:
    screen, cells = data.screen, data.cells
    return replace(
        data,
        cells=MemoryCells(cells.counts[rows], {name: column[rows] for name, column in cells.obs.items()}),
        screen=replace(
            screen,
            mean=screen.mean[rows],
            std=screen.std[rows],
            label=screen.label[rows],
            stratum=screen.stratum[rows],
        ),
    )


def _fold(data: ScreenData, logs: sp.csr_matrix, part: NDArray[np.int64], rest: NDArray[np.int64]) -> _Fold:
    effects = fit_effects(_take(data, part), data.labels)
    return _Fold(effects, _measure(data, logs, part), _measure(data, logs, rest))


def _measure(data: ScreenData, logs: sp.csr_matrix, rows: NDArray[np.int64]) -> F64:
    """Return the effect of every label on the mean logarithm ``[L, G]``, within strata; 0 for one without cells."""
    screen = data.screen
    control = rows[screen.label[rows] < 0]
    found = np.zeros((len(data.labels), logs.shape[1]))
    for label in range(len(found)):
        cells = rows[screen.label[rows] == label]
        if len(cells) and len(control):
            found[label] = log_effect(logs, cells, control, screen.stratum)
    return found


def _respond(flow: PerturbationFlow, data: ScreenData, rng: np.random.Generator, *, known: bool) -> _Response:
    """Draw control cells from the strata of random labels, and predict them under these; ``known``: labels count as
    trained.
    """
    screen = data.screen
    control = np.flatnonzero(screen.label < 0)
    label = rng.integers(len(data.labels), size=SOURCES)
    rows = np.zeros(SOURCES, np.int64)
    for number in np.unique(label):
        weight = control_weights(np.flatnonzero(screen.label == number), control, screen.stratum)
        rows[label == number] = rng.choice(control, int((label == number).sum()), p=weight)
    sets = PerturbationSet(
        *(torch.from_numpy(part[label]) for part in (screen.known, screen.gene, screen.dose, screen.there))
    )
    if not known:
        sets.known.fill_(-1)
    latents = torch.from_numpy(screen.mean[rows])
    moved = flow.transport(latents, sets, STEPS)
    covariates = {name: torch.from_numpy(column[rows]) for name, column in data.cells.obs.items()}
    counts = data.cells.counts[rows]
    library = np.maximum(np.asarray(counts.sum(1)).ravel(), 1.0)
    share = np.asarray(counts.T @ (1 / library)) / len(library)
    nothing = np.zeros(counts.shape[1])
    before, after = (
        flow.decode(cells, anchor(flow, cells, covariates, counts, nothing), covariates) for cells in (latents, moved)
    )
    base = np.stack([np.asarray(log_cp10k(half).mean(0, dtype=np.float64)).ravel() for half in _halves(counts)])
    return _Response(share, np.stack([_mean_log(counts, before, after, shift) - base for shift in SHIFTS], axis=1))


def _halves(counts: sp.csr_matrix) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    half = counts.shape[0] // 2
    return counts[:half], counts[half : 2 * half]


def _mean_log(counts: sp.csr_matrix, before: NegativeBinomial, after: NegativeBinomial, shift: float) -> F64:
    """Return mean log(1 + counts per 10,000) ``[2, G]`` of two halves of the cells, with every share times e^shift."""
    half = counts.shape[0] // 2
    found = np.zeros((2, counts.shape[1]))
    for keys in torch.arange(2 * half).split(TOGETHER):
        measured = torch.from_numpy(counts[keys.numpy()].toarray()).float()
        old, new = (NegativeBinomial(part.logits[keys], part.library[keys], part.log_theta) for part in (before, after))
        library = measured.sum(1).clamp_min(1.0) * new.library / old.library
        drawn = change_counts(measured, old, replace(new, library=new.library * math.exp(shift)), keys)
        logs = torch.log1p(drawn * (TARGET_SUM / library)[:, None]).double()
        for place in (0, 1):
            found[place] += logs[(keys >= half) == bool(place)].sum(0).numpy() / half
    return found
