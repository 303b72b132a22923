"""Average effects of a screen's perturbations, and from them the effect of any set, dose or unseen target.

Single perturbations are shrunk towards no effect, combinations towards the sum of their members, doses of one drug
towards their common direction. Between trained doses the effect is interpolated over the logarithm of the dose, from
a trained dose of 0 over the dose; below the lowest it falls to zero with the dose, above the highest it stays the
same. An unseen target is predicted by ridge regression on the rows of genes, shrunk towards the average perturbation,
with a strength chosen by leaving perturbations out; with few targets among the genes, it is the average of all
perturbations. If a regulatory network is known, a multiple of its prediction is added first, provided that this
brings left-out perturbations closer.

Axes: R trained sets with their dose, P perturbations, G genes, E size of a gene's row, E' of its part from the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.hub.about import EffectScale
from bgen.tasks.perturb.effect_estimates import raw_effects, shrink
from bgen.tasks.perturb.screen import ScreenData

RIDGES = (1.0, 10.0, 100.0, np.inf)
LEAST_CELLS = 2
LEAST_TARGETS = 6
"""Targets needed for predicting unseen ones by anything but the average."""


@dataclass(frozen=True)
class Effects:
    """sets: members of each, sorted; doses ``[R]`` (NaN: none); values ``[R, G]`` natural logs, not scaled.

    network: ``[E', G]``, see :class:`bgen.models.generators.perturbation_flow.PerturbationFlow`; None or empty:
    unknown.
    """

    sets: list[tuple[str, ...]]
    doses: NDArray[np.float64]
    values: NDArray[np.float32]
    scale: EffectScale = field(default_factory=EffectScale)
    network: NDArray[np.float32] | None = None

    def of(
        self,
        parts: Sequence[str],
        dose: float | None,
        gene_rows: NDArray[np.float32],
        targets: NDArray[np.int64],
        places: dict[str, int],
    ) -> NDArray[np.float64]:
        """Return the effect ``[G]`` of a set.

        Parameters
        ----------
        gene_rows
            ``[G, E]``.
        targets
            Target genes of ``parts``; -1 for a drug.
        places
            Target gene of every trained perturbation; -1 for a drug.
        """
        own = self._trained(tuple(sorted(parts)), dose)
        if own is not None:
            return self.scale.trained * own
        total = np.zeros(self.values.shape[1])
        for part, target in zip(parts, targets, strict=True):
            one = self._trained((part,), dose)
            if one is not None:
                total += self.scale.trained * one
            else:
                total += self.scale.unseen * self.unseen(int(target), gene_rows, places)
        return total

    def _trained(self, members: tuple[str, ...], dose: float | None) -> NDArray[np.float64] | None:
        rows = [row for row, names in enumerate(self.sets) if names == members]
        if not rows:
            return None
        doses, values = self.doses[rows], self.values[rows].astype(np.float64)
        if dose is None or np.isnan(doses).all():
            mean: NDArray[np.float64] = values.mean(0)
            return mean
        order = np.argsort(doses)
        doses, values = doses[order], values[order]
        if dose <= doses[0]:
            return values[0] * (dose / doses[0] if doses[0] > 0 else 1.0)
        above = int(np.searchsorted(doses, dose))
        if above == len(doses):
            return values[-1]
        low, high = doses[above - 1 : above + 1]
        part = np.log(dose / low) / np.log(high / low) if low > 0 else dose / high
        return (1 - part) * values[above - 1] + part * values[above]

    def without(self, row: int) -> Effects:
        """Leave one of the R out."""
        return Effects(
            self.sets[:row] + self.sets[row + 1 :], np.delete(self.doses, row), np.delete(self.values, row, 0)
        )

    def unseen(self, target: int, gene_rows: NDArray[np.float32], places: dict[str, int]) -> NDArray[np.float64]:
        """Return the effect ``[G]`` of a target that was not trained on, not scaled; arguments as of :meth:`of`.

        With few targets among the genes, or no target of its own (-1), it is the average over all single perturbations.
        """
        singles = {names[0]: row for row, names in enumerate(self.sets) if len(names) == 1}
        if not singles:
            return np.zeros(self.values.shape[1])
        every = self.values[list(singles.values())].astype(np.float64)
        genes = np.array([places[name] for name in singles])
        known = np.flatnonzero(genes >= 0)
        own = every[known, genes[known]].copy()
        every[known, genes[known]] = every.mean(0)[genes[known]]
        y, genes = every[known], genes[known]
        predicted = np.zeros(y.shape[1])
        enough = len(known) >= LEAST_TARGETS and target >= 0
        if enough and self.network is not None and len(self.network):
            regulated = gene_rows[:, -len(self.network) :][[*genes, target]].astype(np.float64) @ self.network
            share = _share(regulated[:-1], y)
            y = y - share * regulated[:-1]
            predicted += share * regulated[-1]
        mean = y.mean(0) if enough else every.mean(0)
        predicted += mean
        if enough:
            predicted += _ridge(gene_rows[genes], y - mean, gene_rows[target])
        if target >= 0 and len(own):
            predicted[target] = own.mean()
        return predicted


def fit_effects(data: ScreenData, labels: pd.DataFrame) -> Effects:
    """Estimate the effect of every label of a screen; ``labels`` has columns ``members`` and ``dose``."""
    screen, counts = data.screen, data.cells.counts
    control = np.flatnonzero(screen.label < 0)
    sets = [tuple(sorted(names)) for names in labels["members"]]
    doses = labels["dose"].to_numpy(np.float64)
    values = np.zeros((len(sets), counts.shape[1]))
    shapes = _shapes(data, sets, control)
    for row in sorted(range(len(sets)), key=lambda row: len(sets[row])):  # combinations after their members
        cells = np.flatnonzero(screen.label == row)
        if len(cells) < LEAST_CELLS:
            continue
        estimate, error = raw_effects(counts, cells, control, screen.stratum)
        expected = np.zeros(counts.shape[1])
        if len(sets[row]) > 1:
            parts = [_row(sets, doses, (name,), doses[row]) for name in sets[row]]
            expected = values[[at for at in parts if at is not None]].sum(0)
        elif sets[row] in shapes:
            expected = _along(shapes[sets[row]], estimate, error)
        values[row] = expected + shrink(estimate - expected, error)
    return Effects(sets, doses, values.astype(np.float32))


def _shapes(
    data: ScreenData, sets: list[tuple[str, ...]], control: NDArray[np.int64]
) -> dict[tuple[str, ...], NDArray[np.float64]]:
    """Return the effect ``[G]`` of all cells of a single perturbation, for those at several doses."""
    shapes: dict[tuple[str, ...], NDArray[np.float64]] = {}
    for names in set(sets):
        rows = [row for row, other in enumerate(sets) if other == names]
        cells = np.flatnonzero(np.isin(data.screen.label, rows))
        if len(names) == 1 and len(rows) > 1 and len(cells) >= LEAST_CELLS:
            shapes[names] = shrink(*raw_effects(data.cells.counts, cells, control, data.screen.stratum))
    return shapes


def _along(
    shape: NDArray[np.float64], estimate: NDArray[np.float64], error: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the part of an estimate ``[G]`` along a shape: ``a shape``, a shrunk by its own error."""
    information = float((shape**2 / error**2).sum())
    if information == 0:
        return np.zeros_like(shape)
    a = float((shape * estimate / error**2).sum()) / information
    return max(0.0, 1 - 1 / max(information * a**2, 1e-12)) * a * shape


def _row(sets: list[tuple[str, ...]], doses: NDArray[np.float64], names: tuple[str, ...], dose: float) -> int | None:
    for row, other in enumerate(sets):
        if other == names and (doses[row] == dose or (np.isnan(doses[row]) and np.isnan(dose))):
            return row
    return None


def _share(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Fit ``y [P, G]`` = a ``x [P, G]`` + a constant per gene, and return a; 0 if that does not predict left-out rows
    better.

    Leaving out row p removes P / (P - 1) times its own product from a sum of products of deviations, and makes its own
    deviation P / (P - 1) times as large.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    products, squares = (x * y).sum(1), (x**2).sum(1)
    leave = len(x) / (len(x) - 1)
    without = (products.sum() - leave * products) / np.maximum(squares.sum() - leave * squares, 1e-12)
    if ((y - without[:, None] * x) ** 2).sum() >= (y**2).sum():
        return 0.0
    return float(products.sum() / squares.sum())


def _ridge(x: NDArray[np.float32], y: NDArray[np.float64], at: NDArray[np.float32]) -> NDArray[np.float64]:
    """Predict ``[G]`` at a row ``[E]`` from ``x [P, E]``, ``y [P, G]`` of mean 0."""
    rows = x.astype(np.float64)
    centre = rows.mean(0)
    rows = rows - centre
    kernel = rows @ rows.T
    best, chosen = np.inf, np.inf
    for ridge in RIDGES:
        hat = np.zeros_like(kernel) if np.isinf(ridge) else kernel @ np.linalg.inv(kernel + ridge * np.eye(len(rows)))
        hat += 1 / len(rows)  # the intercept
        left_out = (y - hat @ y) / np.maximum(1 - np.diag(hat), 1e-3)[:, None]
        if (left_out**2).sum() < best:
            best, chosen = float((left_out**2).sum()), ridge
    if np.isinf(chosen):
        return np.zeros(y.shape[1])
    weights = np.linalg.solve(kernel + chosen * np.eye(len(rows)), rows @ (at.astype(np.float64) - centre))
    predicted: NDArray[np.float64] = weights @ y
    return predicted
