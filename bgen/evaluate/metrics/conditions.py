"""Whether cells are what was asked for: labels as a classifier of real cells reads them, and numbers as a regressor
does.

Agreement alone rewards cells that are too typical of their label, so distances within each label stand beside it.

Axes: N cells on each side, D components.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bgen.evaluate.metrics.counts import spearman
from bgen.evaluate.metrics.distribution import Points, energy, transport
from bgen.evaluate.metrics.metric import Metric

Labels = NDArray[np.str_]


@dataclass(frozen=True, eq=False)
class Labelled(Points):
    """Points with a label each.

    Attributes
    ----------
    real_labels
        Of real cells, ``[N]``.
    asked
        What the other cells were asked to be, ``[N]``.
    told
        What a classifier trained on real cells says that the other cells are, ``[N]``.
    counted
        Labels with cells enough.
    """

    real_labels: Labels
    asked: Labels
    told: Labels
    counted: tuple[str, ...]

    def fields_of(self, rows: NDArray[np.intp]) -> dict[str, Any]:
        """Return the fields that hold something of each cell, for the cells of some places."""
        labels = {name: getattr(self, name)[rows] for name in ("real_labels", "asked", "told")}
        return super().fields_of(rows) | labels

    @cached_property
    def agreements(self) -> dict[str, float]:
        """Share of the cells that were asked to be it that are it, by label."""
        return {label: float((self.told[self.asked == label] == label).mean()) for label in self._there(self.asked)}

    @cached_property
    def energies(self) -> dict[str, float]:
        """Energy distance between real and other cells of a label."""
        return {label: energy(*within) for label, within in self._within.items()}

    @cached_property
    def transports(self) -> dict[str, float]:
        """2-Wasserstein distance between real and other cells of a label."""
        return {label: transport(between, 2) for label, (_, _, between) in self._within.items()}

    @cached_property
    def _within(self) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]]:
        found = {}
        for label in self._there(self.real_labels):
            x, y = np.flatnonzero(self.real_labels == label), np.flatnonzero(self.asked == label)
            n = min(len(x), len(y))
            if n >= 2:
                x, y = x[:n], y[:n]
                blocks = self.within_real[np.ix_(x, x)], self.within_other[np.ix_(y, y)], self.between[np.ix_(x, y)]
                found[label] = blocks
        return found

    def _there(self, labels: Labels) -> list[str]:
        present = set(labels.tolist())
        return [label for label in self.counted if label in present]


@dataclass(frozen=True, eq=False)
class Numbered:
    """A number that was asked for, and what was delivered, of each cell: both ``[N]``."""

    asked: NDArray[np.float64]
    told: NDArray[np.float64]

    def take(self, rows: NDArray[np.intp]) -> Numbered:
        """Return the cells of some places."""
        return Numbered(self.asked[rows], self.told[rows])


def mean_over_labels(figures: dict[str, float]) -> float:
    """Return the mean, in which a rare label counts as much as a common one; 0 where no label has cells enough."""
    return float(np.mean(list(figures.values()))) if figures else 0.0


LABEL_METRICS: tuple[Metric[Labelled], ...] = (
    Metric(
        "agreement",
        "agreement",
        "higher",
        3,
        "Share of cells of a label that a classifier trained on real cells takes for it; mean over labels.",
        lambda p: mean_over_labels(p.agreements),
        0.1,
    ),
    Metric(
        "energy_within",
        "energy within",
        "lower",
        3,
        "Energy distance within each label; mean over labels.",
        lambda p: mean_over_labels(p.energies),
        0.3,
    ),
    Metric(
        "w2_within",
        "2-Wasserstein within",
        "lower",
        2,
        "2-Wasserstein distance within each label; mean over labels.",
        lambda p: mean_over_labels(p.transports),
        0.05,
        relative=True,
    ),
)

NUMBER_METRICS: tuple[Metric[Numbered], ...] = (
    Metric(
        "rank",
        "rank",
        "higher",
        3,
        "Rank correlation of the number that was asked for and the number that was delivered.",
        lambda p: spearman(p.asked, p.told),
        0.05,
    ),
)

METRICS: tuple[Metric[Any], ...] = (*LABEL_METRICS, *NUMBER_METRICS)
