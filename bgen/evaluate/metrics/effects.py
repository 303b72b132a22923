"""Whether the predicted effect of a perturbation agrees with the real one.

An effect is a difference per gene between perturbed and control cells, here of mean log(1 + counts per 10,000). Genes
that were perturbed themselves are left out of every figure per gene: that a target goes down is known beforehand.

Symbols, vectors over genes: p the predicted effect; p_1, p_2 the same with independent noise; r the real effect in the
cells that predictions are compared with; r' that in other cells of the same perturbation; w weights of genes.

Axes: G genes, P perturbations, N cells, D components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from bgen.arrays import F64
from bgen.evaluate.metrics.distribution import Points, energy_distance
from bgen.evaluate.metrics.metric import Metric

TOP = 20
"""Number of genes with the clearest real effects, to which some figures are limited."""


Chance = tuple[float, float, float]
"""Expected value, own standard error and shared standard error of a term without any effect."""


@dataclass(frozen=True, eq=False)
class PredictedEffect(Points):
    """The predicted effect of one perturbation beside the real ones; as points, its predicted and real cells.

    Attributes
    ----------
    effect
        p ``[G]``.
    halves
        p_1 and p_2 ``[G]``: equal where the prediction has no noise.
    real_effects
        r ``[P, G]`` of all P perturbations that are judged together.
    targets
        Genes that each of the P perturbs itself.
    own
        Which of the P is predicted.
    other_effect
        r' ``[G]`` of that one.
    means
        Mean effect ``[G]`` over the P perturbations, twice with independent noise: first for predictions, then for r.
    scale
        Size of real effects less their mean over that of predicted ones: roots of mean squares over the P.
    clearness, real_clearness
        Absolute t ``[G]`` of the effect in the other cells, which r does not hold, and in those of r.
    noise
        Sampling variance ``[G]`` of r.
    real_chance, weighted_chance, predicted_chance
        What <r', r>, sum w (r^2 - noise) and <p_1, p_2> would be without any effect: the expected value, the standard
        error from the perturbation's own cells, and that from control cells, which perturbations may share.
    """

    effect: F64
    halves: tuple[F64, F64]
    real_effects: F64
    targets: Sequence[NDArray[np.int64]]
    own: int
    other_effect: F64
    means: tuple[F64, F64]
    scale: float
    clearness: F64
    real_clearness: F64
    noise: F64
    real_chance: Chance = (0.0, 0.0, 0.0)
    weighted_chance: Chance = (0.0, 0.0, 0.0)
    predicted_chance: Chance = (0.0, 0.0, 0.0)

    @property
    def real_effect(self) -> F64:
        """The real effect ``[G]`` that is predicted."""
        effect: F64 = self.real_effects[self.own]
        return effect

    @cached_property
    def genes(self) -> NDArray[np.intp]:
        """Genes that are judged: all but the targets."""
        return judged_genes(len(self.effect), self.targets[self.own])

    @cached_property
    def top(self) -> NDArray[np.intp]:
        """The genes with the clearest effects, at most :data:`TOP`."""
        return clearest(self.clearness, self.genes)

    @cached_property
    def weights(self) -> F64:
        """w ``[G]``, see :func:`gene_weights`."""
        return gene_weights(self.clearness, self.genes)


@dataclass(frozen=True, kw_only=True)
class RatioMetric(Metric[PredictedEffect]):
    """A ratio of sums over perturbations; ``compute`` gives the term of the sum above the line.

    Attributes
    ----------
    under
        The term of the sum below the line.
    chance
        What that term would be without any effect.
    """

    under: Callable[[PredictedEffect], float]
    chance: Callable[[PredictedEffect], Chance]


def judged_genes(n: int, targets: NDArray[np.int64]) -> NDArray[np.intp]:
    """Return the numbers of all n genes but the targets."""
    return np.setdiff1d(np.arange(n), targets)


def clearest(clearness: F64, genes: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the :data:`TOP` clearest of some genes."""
    return genes[np.argsort(-clearness[genes], kind="stable")[:TOP]]


def gene_weights(clearness: F64, genes: NDArray[np.intp]) -> F64:
    """Return weights of genes ``[G]``: t^2 - 1, what the effect has beyond noise, of mean 1; 0 for other genes."""
    weights = np.zeros_like(clearness)
    weights[genes] = np.maximum(clearness[genes] ** 2 - 1, 0)
    return weights * (len(genes) / max(float(weights.sum()), 1e-12))


def correlation(x: F64, y: F64) -> float:
    """Return the Pearson correlation; 0 where one side does not vary (an effect of nothing explains nothing)."""
    if len(x) < 2 or x.std() < 1e-12 or y.std() < 1e-12:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def specific(e: PredictedEffect) -> float:
    """Return <p - m, r - m'>: what p and r share beyond the mean effect of all perturbations.

    m' is the mean of r, and m that in other cells, so that noise is not shared. Deviations of r from its mean add up to
    0 at each gene: a prediction that is the same for every perturbation gets exactly 0 in sum, whatever it is. With one
    perturbation it is not defined. The reference is that of Systema (Viñas Torné et al., Nat. Biotechnol. 2025).
    """
    if len(e.real_effects) < 2:
        return float("nan")
    return float((e.effect - e.means[0])[e.genes] @ (e.real_effect - e.means[1])[e.genes])


def specific_size(e: PredictedEffect) -> float:
    """Return (scale |p - m|^2 + |r - m'|^2 / scale) / 2.

    Its sum over perturbations is the root of the product of both sums of squares: :func:`specific` over it is a
    correlation over all perturbations and genes.
    """
    predicted, real = (e.effect - e.means[0])[e.genes], (e.real_effect - e.means[1])[e.genes]
    return float(e.scale * (predicted @ predicted) + (real @ real) / e.scale) / 2


def direction(effect: F64, real: F64) -> float:
    """Return the share of genes that are moved to the right side.

    Genes without a real effect have no right side and are left out; one that is predicted not to move counts half, as a
    guess would. NaN if no gene has a real effect.
    """
    moved = real != 0
    if not moved.any():
        return float("nan")
    return float(((np.sign(effect) == np.sign(real)) + 0.5 * (effect == 0))[moved].mean())


def recovery(effect: F64, clear: NDArray[np.bool_]) -> float:
    """Return how likely one of the clear genes has a larger absolute predicted effect than one of the others.

    The area under the ROC curve: ties count half, 0.5 is chance. NaN if there is no gene of either kind.
    """
    n, others = int(clear.sum()), int((~clear).sum())
    if not n or not others:
        return float("nan")
    return float((rankdata(np.abs(effect))[clear].sum() - n * (n + 1) / 2) / (n * others))


def explained(effect: F64, halves: tuple[F64, F64], real: F64) -> float:
    """Return 2 <p, r> - <p_1, p_2>: expected, |r|^2 less the squared error of p, both without noise."""
    return float(2 * effect @ real - halves[0] @ halves[1])


def discrimination(effect: F64, real: F64, own: int, targets: Sequence[NDArray[np.int64]]) -> float:
    """Return 1 - (real effects closer than the own one, ties half) / (P - 1), by L1 distance.

    Two real effects are compared without the targets of either: else an effect would be further away just because its
    own target is down.
    """
    if len(real) < 2:
        return float("nan")
    away = np.abs(effect - real)  # [P, G]
    away[:, targets[own]] = 0
    theirs = np.array([some[genes].sum() for some, genes in zip(away, targets, strict=True)])
    mine = np.array([away[own, genes].sum() for genes in targets])
    total = away.sum(1)
    difference = np.delete((total - theirs) - (total[own] - mine), own)
    difference[np.abs(difference) < 1e-12 * total.max()] = 0
    closer = (difference < 0).sum() + 0.5 * (difference == 0).sum()
    return float(1 - closer / len(difference))


def shape(points: Points) -> float:
    """Return the energy distance of two populations after both are moved to mean 0.

    What is left is how cells differ among themselves: a population that has collapsed, or whose genes no longer vary
    together, is far from a real one whatever its mean.
    """
    real, other = (np.asarray(some, np.float64) for some in (points.real, points.other))
    return energy_distance(real - real.mean(0), other - other.mean(0))


METRICS: tuple[Metric[PredictedEffect], ...] = (
    RatioMetric(
        "explained",
        "explained",
        "higher",
        2,
        "Share of the real effects that is predicted, freed of noise: 1 all, 0 as good as no effect, below 0 worse.",
        lambda e: explained(e.effect[e.genes], (e.halves[0][e.genes], e.halves[1][e.genes]), e.real_effect[e.genes]),
        under=lambda e: float(e.other_effect[e.genes] @ e.real_effect[e.genes]),
        chance=lambda e: e.real_chance,
    ),
    RatioMetric(
        "explained_de",
        "explained (DE-weighted)",
        "higher",
        2,
        "The same with a weight per gene: t² - 1 of its effect in other cells.",
        lambda e: explained(e.weights * e.effect, (e.weights * e.halves[0], e.halves[1]), e.real_effect),
        under=lambda e: float(e.weights @ (e.real_effect**2 - e.noise)),
        chance=lambda e: e.weighted_chance,
    ),
    RatioMetric(
        "calibration",
        "calibration",
        "one",
        2,
        "The multiple of predicted effects that would be nearest to the real ones: below 1 they are too large.",
        lambda e: float(e.effect[e.genes] @ e.real_effect[e.genes]),
        under=lambda e: float(e.halves[0][e.genes] @ e.halves[1][e.genes]),
        chance=lambda e: e.predicted_chance,
    ),
    Metric(
        "pearson",
        "Pearson delta",
        "higher",
        3,
        "Correlation over genes of predicted and real effects.",
        lambda e: correlation(e.effect[e.genes], e.real_effect[e.genes]),
    ),
    RatioMetric(
        "specific",
        "specific",
        "higher",
        3,
        "Correlation of what is left without the mean effect of all perturbations: what is particular to each.",
        specific,
        under=specific_size,
        chance=lambda _: (0.0, 0.0, 0.0),
    ),
    Metric(
        "pearson_top",
        f"Pearson (top {TOP} DE)",
        "higher",
        3,
        "Pearson delta over the genes with the clearest effects.",
        lambda e: correlation(e.effect[e.top], e.real_effect[e.top]),
    ),
    Metric(
        "direction",
        f"direction (top {TOP} DE)",
        "higher",
        3,
        "Share of those genes moved to the right side; 0.5: chance.",
        lambda e: direction(e.effect[e.top], e.real_effect[e.top]),
    ),
    Metric(
        "recovery",
        "DE recovery",
        "higher",
        3,
        f"How often one of the {TOP} clearest genes is predicted to move more than another gene; 0.5: chance.",
        lambda e: recovery(e.effect[e.genes], np.isin(e.genes, clearest(e.real_clearness, e.genes))),
    ),
    Metric(
        "shape",
        "shape",
        "lower",
        3,
        "Energy distance of predicted and real perturbed cells about their own means: do cells differ as real ones do?",
        shape,
    ),
    Metric(
        "discrimination",
        "discrimination",
        "higher",
        3,
        "1: closer to its own real effect than to any other; 0.5: chance.",
        lambda e: discrimination(e.effect, e.real_effects, e.own, e.targets),
    ),
)
