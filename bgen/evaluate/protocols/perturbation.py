"""The protocol ``perturbation-v4``: do predicted perturbed cells look like held-out real ones?

Frozen: a change of any figure needs a new protocol id. For each held-out perturbation and each of several seeds the
real perturbed and control cells are split into two halves: one is what predictions are compared with, the other is the
ceiling, and tells which genes have the clearest effects. So no row is measured on noise that chose its genes.

- An effect is the difference of mean log(1 + counts per 10,000) between perturbed and control cells. The control cells
are real and the same in every row, even for a model that would predict its own (otherwise a model could win or lose the
discrimination score by scaling its controls).
- The model's effect is that of cells predicted from the *first* half of the control cells, against that half; the real
effect is measured against the second. So a prediction gains nothing from the noise of the control cells. From the
second half comes its effect with other noise, which the squared size of predictions is freed of noise with.
- Genes that were perturbed themselves are left out of every figure per gene. Distances between cells keep them.
- Control cells that the model and the baselines were trained on, too (``shared_controls``: doses of a drug with few
  vehicle cells), are not split: all of them are the reference of every effect, in both halves. With some 30 cells on
  either side, the noise of two references would be larger than the effect of the drug. One reference adds the same
  noise to all real and predicted effects: rows compare with each other, but their correlations not with those of other
  screens. Control cells moved by an effect that was measured against themselves would be closer to the truth than any
  sample can be, so baselines are then real cells (``populations``): of the nearest dose, of all training perturbations.
- A baseline is an effect that needs no model: "control copy" (none) and what the caller gives. As cells it is the real
  control cells moved by the effect.
- "ceiling" is the other half of the real cells. Its effect is as noisy as the real one, so shares that are freed of
  noise are not given for it: they would be 1 by construction. "duplicate" is a positive control for them: the other
  half drawn towards the mean of all held-out perturbations, as far as suits the others (after the interpolated
  duplicate of bioRxiv 2025.10.20.683304). A figure that does not put it near the top cannot rank models. It has the
  noise of half of the cells, so an effect from many training cells may be above it.
- What is done with the figures: :mod:`bgen.evaluate.protocols.perturbation_scores`.

Axes: N cells, G genes, P held-out perturbations, D components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.arrays import F64
from bgen.errors import UserError
from bgen.evaluate.metrics.effects import Chance, PredictedEffect, gene_weights, judged_genes
from bgen.evaluate.metrics.metric import Metric
from bgen.evaluate.metrics.registry import choose_metrics
from bgen.evaluate.metrics.space import Space, fit_space
from bgen.evaluate.protocols.perturbation_scores import (
    CEILING,
    CONTROL_COPY,
    DUPLICATE,
    MODEL,
    PerturbationScores,
    measured,
)
from bgen.genes.expression import log_cp10k

PROTOCOL = "perturbation-v4"
MAX_CELLS = 500
MIN_CELLS = 10
NOISE_CELLS = 200
"""Cells from which the covariance of genes is known well enough."""

FREED = ("explained", "explained_de", "calibration")
"""Figures that are freed of noise, in which the ceiling would be perfect by construction."""

METRICS: tuple[Metric[PredictedEffect], ...] = (
    *choose_metrics(*FREED),
    *choose_metrics("pearson", "specific", "pearson_top", "direction", "recovery"),
    replace(
        choose_metrics("energy")[0],
        title="E-distance",
        meaning="Energy distance of predicted and real perturbed cells.",
    ),
    *choose_metrics("shape", "discrimination"),
)


@dataclass(frozen=True)
class HeldOut:
    """One held-out perturbation.

    Attributes
    ----------
    label
        Its name, with what tells it apart from others: the dose, the replicate.
    real, control
        Counts ``[N, G]`` of real perturbed cells, and of real control cells of the same kind.
    predicted
        Counts of predicted cells, at least as many as half of ``real``.
    baselines
        Name to effect ``[G]``, without "control copy".
    targets
        Genes that were perturbed themselves: figures per gene leave them out.
    shared_controls
        Whether ``control`` was trained on, too.
    populations
        Name of a baseline to counts of the real cells that it consists of; others are control cells moved by it.
    name
        The perturbation alone: what has the same name is one observation. Default: the label.
    sources
        Row in ``control`` of the cell that each predicted one was made from; None: of none in particular.
    """

    label: str
    real: sp.csr_matrix
    control: sp.csr_matrix
    predicted: sp.csr_matrix
    baselines: Mapping[str, NDArray[np.float64]]
    targets: NDArray[np.int64]
    shared_controls: bool = False
    populations: Mapping[str, sp.csr_matrix] = field(default_factory=dict)
    name: str = ""
    sources: NDArray[np.int64] | None = None


def mean_log(counts: sp.csr_matrix) -> NDArray[np.float64]:
    """Mean of log(1 + counts per 10,000) over cells ``[G]``."""
    return _mean(log_cp10k(counts))


def evaluate_perturbations(train: sp.csr_matrix, held_out: Sequence[HeldOut], *, seeds: int = 3) -> PerturbationScores:
    """Score predictions of held-out perturbations.

    Parameters
    ----------
    train
        Counts of training cells: the embedding of the distances is fitted on them.
    held_out
        Perturbations that were not trained on (or not in these cells).
    seeds
        Random halves, at least 2.

    Raises
    ------
    UserError
        If there is nothing to score, or a perturbation has fewer than 20 real cells.
    """
    short = [f"{one.label} ({one.real.shape[0]})" for one in held_out if one.real.shape[0] < 2 * MIN_CELLS]
    if not held_out or short or seeds < 2:
        raise UserError(
            f"Each held-out perturbation needs at least {2 * MIN_CELLS} real cells, and one and two seeds are needed;"
            f" too few: {', '.join(short) or 'perturbations or seeds'}."
        )
    space = fit_space(train)
    drawn = [_draw(space, one, number, seeds) for number, one in enumerate(held_out)]
    runs = [_one_seed(space, held_out, [of_seeds[seed] for of_seeds, _ in drawn]) for seed in range(seeds)]
    figures = {row: {metric.key: measured(metric, [run[row] for run in runs]) for metric in METRICS} for row in runs[0]}
    for key in FREED:
        figures[CEILING][key] = figures[CEILING][key].without()
    predicted, real = (np.array([effects[at] for _, effects in drawn]) for at in (0, 1))
    for row, one in enumerate(held_out):
        predicted[row, one.targets] = real[row, one.targets] = np.nan
    labels, names = zip(*((one.label, one.name or one.label) for one in held_out), strict=True)
    return PerturbationScores(tuple(labels), tuple(names), figures, predicted, real, PROTOCOL, METRICS)


@dataclass(frozen=True)
class _Drawn:
    """One perturbation at one seed: the half that is predicted, and what rows predict of it.

    Attributes
    ----------
    real, other
        Effects ``[G]`` of the half, and of the other one.
    clearness, real_clearness, noise
        As in :class:`PredictedEffect`.
    chance
        Its ``real_chance``, ``weighted_chance`` and ``predicted_chance``.
    effects
        Row to effect ``[G]``.
    halves
        The model's two effects with independent noise.
    points
        Coordinates ``[n, D]`` of the half's cells, "real", and of each row's.
    at_control
        Those of control cells, which rows without points of their own move.
    """

    real: F64
    other: F64
    clearness: F64
    real_clearness: F64
    noise: F64
    chance: dict[str, Chance]
    effects: dict[str, F64]
    halves: tuple[F64, F64]
    points: dict[str, NDArray[Any]]
    at_control: NDArray[Any]


def _one_seed(
    space: Space, held_out: Sequence[HeldOut], drawn: Sequence[_Drawn]
) -> dict[str, list[PredictedEffect | None]]:
    """Return what every row predicts of every perturbation; None where it says nothing of one."""
    targets = [one.targets for one in held_out]
    real, other = (np.array(part) for part in ([one.real for one in drawn], [one.other for one in drawn]))
    means = _mean_effect(other, targets), _mean_effect(real, targets)
    for number, effect in enumerate(_duplicates(other, real, targets)):
        drawn[number].effects[DUPLICATE] = effect
    names = list(dict.fromkeys(name for one in held_out for name in one.baselines))
    rows = [MODEL, CONTROL_COPY, *names, *([DUPLICATE] if len(drawn) > 2 else []), CEILING]

    def size(effects: Sequence[tuple[int, F64]], mean: F64) -> float:
        """Mean squared size of effects less their mean, at the genes that are judged."""
        away = [(effect - mean)[judged_genes(len(mean), targets[at])] for at, effect in effects]
        return float(np.mean([one @ one for one in away]))

    scales = {}
    for row in rows:
        there = [(at, one.effects[row]) for at, one in enumerate(drawn) if row in one.effects]
        sizes = size(there, means[0]), size([(at, real[at]) for at, _ in there], means[1])
        scales[row] = float(np.sqrt(max(sizes[1], 1e-12) / max(sizes[0], 1e-12)))

    def evidence(row: str, own: int) -> PredictedEffect | None:
        one = drawn[own]
        if row not in one.effects:
            return None
        effect = one.effects[row]
        moved = one.at_control + effect @ space.components.T
        return PredictedEffect(
            real=one.points["real"],
            other=one.points.get(row, moved),
            effect=effect,
            halves=one.halves if row == MODEL else (effect, effect),
            real_effects=real,
            targets=targets,
            own=own,
            other_effect=one.other,
            means=means,
            scale=scales[row],
            clearness=one.clearness,
            real_clearness=one.real_clearness,
            noise=one.noise,
            real_chance=one.chance["real"],
            weighted_chance=one.chance["weighted"],
            predicted_chance=one.chance["predicted"] if row == MODEL else (0.0, 0.0, 0.0),
        )

    return {row: [evidence(row, own) for own in range(len(drawn))] for row in rows}


def _draw(space: Space, one: HeldOut, number: int, seeds: int) -> tuple[list[_Drawn], tuple[F64, F64]]:
    """Return what is drawn of the perturbation ``number`` at each seed, and the predicted and real effects of all."""
    real, control, predicted = (log_cp10k(cells) for cells in (one.real, one.control, one.predicted))
    effects = _mean(predicted) - _mean(control), _mean(real) - _mean(control)
    drawn = [
        _draw_once(space, one, (real, control, predicted), np.random.default_rng([seed, number]), seed)
        for seed in range(seeds)
    ]
    return drawn, effects


def _draw_once(
    space: Space,
    one: HeldOut,
    logs: tuple[sp.csr_matrix, sp.csr_matrix, sp.csr_matrix],
    rng: np.random.Generator,
    seed: int,
) -> _Drawn:
    """Halve the cells of one perturbation and draw equally many for every row; ``logs``: real, control, predicted."""
    real_cells, control_cells, predicted = logs
    order = rng.permutation(real_cells.shape[0])
    first, second = real_cells[order[: len(order) // 2]], real_cells[order[len(order) // 2 :]]
    # The same halves for every perturbation: else a real effect would be furthest from its own other half, whose
    # controls are the rest of its own.
    shuffled = np.random.default_rng(seed).permutation(control_cells.shape[0])
    parts = np.array_split(shuffled, 2)
    first_control, second_control = (control_cells[shuffled if one.shared_controls else part] for part in parts)
    real, other = _mean(second) - _mean(second_control), _mean(first) - _mean(first_control)
    noise = _noise(second) + (0 if one.shared_controls else _noise(second_control))
    clearness = np.abs(other) / np.sqrt(np.maximum(_noise(first) + _noise(first_control), 1e-12))
    real_clearness = np.abs(real) / np.sqrt(np.maximum(_noise(second) + _noise(second_control), 1e-12))
    genes = judged_genes(len(real), one.targets)
    chance = _chances(second, second_control, gene_weights(clearness, genes)[genes], genes, shared=one.shared_controls)
    halves, chance["predicted"] = _predicted_halves(one, predicted, control_cells, parts, genes, rng)
    model = _mean(predicted) - _mean(control_cells) if one.shared_controls else halves[0]
    effects = {MODEL: model, CEILING: other, CONTROL_COPY: np.zeros_like(real), **one.baselines}
    pools = {"real": second, MODEL: predicted, CEILING: first}
    pools |= {name: log_cp10k(cells) for name, cells in one.populations.items()}
    n = min(MAX_CELLS, *(cells.shape[0] for cells in pools.values()))
    # With replacement if there are few controls: what matters is that every row has as many cells.
    rows = rng.choice(control_cells.shape[0], n, replace=control_cells.shape[0] < n)
    points = {name: _project(space, cells[rng.permutation(cells.shape[0])[:n]]) for name, cells in pools.items()}
    return _Drawn(
        real,
        other,
        clearness,
        real_clearness,
        noise,
        chance,
        effects,
        halves,
        points,
        _project(space, control_cells[rows]),
    )


def _project(space: Space, logs: sp.csr_matrix) -> NDArray[Any]:
    return np.asarray(logs @ space.components.T) - space.origin


def _mean_effect(effects: F64, targets: Sequence[NDArray[np.int64]]) -> F64:
    """Return the mean ``[G]`` of effects ``[P, G]``, for each gene over the perturbations of which it is no target."""
    counted = np.ones(effects.shape, bool)
    for row, genes in enumerate(targets):
        counted[row, genes] = False
    mean: F64 = (effects * counted).sum(0) / np.maximum(counted.sum(0), 1)
    return mean


def _duplicates(other: F64, real: F64, targets: Sequence[NDArray[np.int64]]) -> list[F64]:
    """Return the other half's effect ``[G]`` of each of P perturbations, drawn towards the mean of the others.

    m + a (r' - m), with the mean m of r' and the factor a = sum <r' - m, r - m> / sum |r' - m|^2 from all but that one.
    """
    if len(other) < 3:
        return []
    away = [effects - _mean_effect(effects, targets) for effects in (other, real)]
    for row, genes in enumerate(targets):
        away[0][row, genes] = away[1][row, genes] = 0
    products, squares = (away[0] * away[1]).sum(1), (away[0] ** 2).sum(1)
    made = []
    for own in range(len(other)):
        rest = np.delete(other, own, 0)
        mean = _mean_effect(rest, [genes for at, genes in enumerate(targets) if at != own])
        share = (products.sum() - products[own]) / max(float(squares.sum() - squares[own]), 1e-12)
        made.append(mean + float(np.clip(share, 0, 1)) * (other[own] - mean))
    return made


def _noise(logs: sp.csr_matrix) -> F64:
    """Return the sampling variance ``[G]`` of the mean of cells."""
    variance: F64 = np.maximum(_mean(logs.multiply(logs)) - _mean(logs) ** 2, 0) / max(logs.shape[0] - 1, 1)
    return variance


def _spread(logs: sp.csr_matrix, weights: F64 | None = None) -> tuple[float, float]:
    """Return tr(S) and tr(S^2), S the covariance of genes over cells ``[N, G]``, from products of different cells."""
    cells = logs.toarray().astype(np.float64)
    cells -= cells.mean(0)
    if weights is not None:
        cells *= np.sqrt(weights)
    products = cells @ cells.T
    n, own = len(cells), np.diag(products)
    return float(own.sum()) / max(n - 1, 1), float((products**2).sum() - (own**2).sum()) / max(n * (n - 1), 1)


def _chances(
    perturbed: sp.csr_matrix, control: sp.csr_matrix, weights: F64, genes: NDArray[np.intp], *, shared: bool
) -> dict[str, Chance]:
    """Return ``real_chance`` and ``weighted_chance`` of :class:`PredictedEffect`, from the cells of one half.

    Without an effect r and r' are noise with the covariance C = S_p / n + S_c / m: <r', r> has the variance tr(C^2),
    sum w (r^2 - noise) twice that of weighted genes. Control cells that both halves have (``shared``) add the same
    noise to both: its square, expected to be tr(S_c) / m, with twice the variance.
    """
    logs = [cells[:NOISE_CELLS][:, genes] for cells in (perturbed, control)]
    n, m = perturbed.shape[0], control.shape[0]
    found: dict[str, Chance] = {}
    for name, some, times in (("real", None, 1), ("weighted", weights, 2)):
        (_, own), (trace, of_control) = (_spread(part, some) for part in logs)
        between = np.sqrt(own * of_control) / (n * m)
        common = np.sqrt((2 if shared else times) * of_control) / m
        found[name] = trace / m if shared else 0.0, float(np.sqrt(times * (own / n**2 + 2 * between))), float(common)
    return found


def _predicted_halves(
    one: HeldOut,
    logs: sp.csr_matrix,
    of_control: sp.csr_matrix,
    parts: Sequence[NDArray[np.intp]],
    genes: NDArray[np.intp],
    rng: np.random.Generator,
) -> tuple[tuple[F64, F64], Chance]:
    """Return the effect of cells predicted from either part of the control cells, and their product by chance.

    Where predicted cells have sources, what is noise is the difference of each to its source.
    """
    if one.sources is None:
        rows = np.array_split(rng.permutation(logs.shape[0]), 2)
        noisy = [
            float(np.sqrt(_spread(cells[some[:NOISE_CELLS]][:, genes])[1])) / len(some)
            for cells, some in ((logs, rows[0]), (of_control, parts[0]))
        ]
        chance = 0.0, noisy[0], noisy[1]
    else:
        rows = [np.flatnonzero(np.isin(one.sources, part)) for part in parts]
        some = rng.permutation(len(one.sources))[:NOISE_CELLS]
        moved = sp.csr_matrix(logs[some] - of_control[one.sources[some]])[:, genes]
        chance = 0.0, float(np.sqrt(_spread(moved)[1])) / min(len(rows[0]), len(rows[1])), 0.0
    first, second = (_mean(logs[row]) - _mean(of_control[part]) for row, part in zip(rows, parts, strict=True))
    return (first, second), chance


def _mean(logs: sp.csr_matrix) -> F64:
    return np.asarray(logs.mean(0, dtype=np.float64)).ravel()
