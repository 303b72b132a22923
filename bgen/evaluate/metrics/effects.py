"""Whether the predicted effect of a perturbation agrees with the real one.

An effect is a difference per gene between perturbed and control cells, here of mean log(1 + counts per 10,000).

Axes: G genes, P perturbations, N cells, D components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bgen.arrays import F64
from bgen.evaluate.metrics.distribution import Points
from bgen.evaluate.metrics.metric import Metric

TOP = 20
"""Number of genes with the clearest real effects, to which some figures are limited."""


@dataclass(frozen=True, eq=False)
class PredictedEffect(Points):
    """The predicted effect of one perturbation beside the real ones; as points, its predicted and real cells.

    Attributes
    ----------
    effect
        Predicted, ``[G]``.
    real_effects
        Real ones of all P perturbations that are judged together, ``[G]`` each.
    own
        Which of them it predicts.
    top
        The genes with its clearest real effects, ``[TOP]``.
    size
        Mean over the P perturbations of the squared size of a real effect, freed of sampling noise.
    targets
        Genes that were perturbed themselves.
    """

    effect: F64
    real_effects: Sequence[F64]
    own: int
    top: NDArray[np.intp]
    size: float
    targets: NDArray[np.int64]

    @property
    def real_effect(self) -> F64:
        """The real effect ``[G]`` that is predicted."""
        return self.real_effects[self.own]


def correlation(x: F64, y: F64) -> float:
    """Return the Pearson correlation; 0 where one side does not vary (an effect of nothing explains nothing)."""
    if x.std() < 1e-12 or y.std() < 1e-12:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def direction(effect: F64, real: F64) -> float:
    """Return the share of genes that are moved to the right side."""
    return float((np.sign(effect) == np.sign(real)).mean())


def slope(effect: F64, real: F64, size: float) -> float:
    """Return <effect, real> / size; its mean over perturbations is how large predicted effects are beside real ones."""
    return float(effect @ real) / max(size, 1e-9)


def discrimination(effect: F64, real: Sequence[F64], own: int, targets: NDArray[np.int64]) -> float:
    """Return 1 - (real effects closer than the own one, ties half) / (P - 1), by L1 distance, without the targets."""
    if len(real) < 2:
        return float("nan")
    kept = np.setdiff1d(np.arange(len(effect)), targets)
    distance = np.array([np.abs(effect[kept] - other[kept]).sum() for other in real])
    others = np.delete(distance, own)
    closer = (others < distance[own]).sum() + 0.5 * (others == distance[own]).sum()
    return float(1 - closer / len(others))


METRICS: tuple[Metric[PredictedEffect], ...] = (
    Metric(
        "pearson",
        "Pearson delta",
        "higher",
        3,
        "Correlation over genes of predicted and real effects.",
        lambda e: correlation(e.effect, e.real_effect),
    ),
    Metric(
        "pearson_top",
        f"Pearson, top {TOP} DE",
        "higher",
        3,
        "The same over the genes with the clearest effects.",
        lambda e: correlation(e.effect[e.top], e.real_effect[e.top]),
    ),
    Metric(
        "direction",
        f"direction, top {TOP} DE",
        "higher",
        3,
        "Share of those genes moved to the right side.",
        lambda e: direction(e.effect[e.top], e.real_effect[e.top]),
    ),
    Metric(
        "slope",
        "slope",
        "one",
        2,
        "Size of predicted effects in units of the real ones; 1 is right.",
        lambda e: slope(e.effect, e.real_effect, e.size),
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
