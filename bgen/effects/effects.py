"""What a perturbation does on average to a user's control cells: known sets, combinations, doses and unseen targets.

An effect is a difference of log(1 + counts per 10,000) of average cells. On this scale a gene that is off in control
cells gets what it got in training, and not a ratio times its few molecules. What is known are the general effect of
each set, and how it differs in each context of training (:mod:`bgen.effects.fit`); for a user's control
cells contexts count by how alike their control cells are (:mod:`bgen.effects.context_pool`).

- Between trained doses the effect is interpolated over the logarithm of the dose, from a trained dose of 0 over the
  dose; below the lowest it falls to zero with the dose, above the highest it stays the same.
- The effect of an unseen combination is the sum of its members' times one factor, fitted to trained combinations.
- An unseen target is predicted by ridge regression on what is known of targets, such as rows of genes, shrunk towards
  the average perturbation, with a strength chosen by leaving perturbations out; with few targets known, it is the
  average of all perturbations. If a regulatory network is known, a multiple of its prediction is added first, provided
  that this brings left-out perturbations closer. The target itself falls by the typical fold of others.
- If the control cells are those of training, their sampling error is known in part from all other cells of the
  context, and is not predicted along.
- What the flow says of these control cells is as good an estimate (:meth:`Effects.joined`): of sets whose members
  were trained on, the two are averaged.

Axes: R trained sets with their dose, P single perturbations, C contexts, G genes, E size of a vector of a perturbation,
E' of its part from the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from bgen.arrays import F32, F64
from bgen.effects.context_pool import ContextPool, Controls
from bgen.genes.table import find_genes
from bgen.hub.about import EffectOf, EffectPooling
from bgen.models.generators.average_effects import AverageEffects

RIDGES = (0.1, 1.0, 10.0, 100.0, np.inf)
LEAST_TARGETS = 6
"""Targets needed for predicting unseen ones by anything but the average."""

MOST_LARGER = 1.25
"""By how much the average of two estimates is enlarged at most."""


@dataclass(frozen=True)
class Known:
    """What is known of perturbations by name, whether trained on or not.

    Attributes
    ----------
    vectors
        Name to a vector ``[E]``, the same size for all, such as the co-expression row of the target gene.
    targets
        Name to the number of the target gene, where it is one of the model's.
    network
        ``[E', G]``: maps the last E' elements of a vector to the genes that the target regulates, on the scale of
        natural logarithms; None: unknown.
    """

    vectors: Mapping[str, F32] = field(default_factory=dict)
    targets: Mapping[str, int] = field(default_factory=dict)
    network: F32 | None = None

    @classmethod
    def of_vectors(
        cls, genes: pd.DataFrame, names: Sequence[str], rows: NDArray[np.int64], vectors: F32, network: F32 | None
    ) -> Known:
        """Return what vectors ``[V, E]`` tell of perturbations, whose ``rows`` they are (-1: nothing is known)."""
        found = {name: vectors[row] for name, row in zip(names, rows.tolist(), strict=True) if row >= 0}
        targets = zip(names, find_genes(genes, names).tolist(), strict=True)
        return cls(found, {name: gene for name, gene in targets if gene >= 0}, network)


@dataclass(frozen=True)
class Effects:
    """Average effects, and how they are asked.

    Attributes
    ----------
    sets, doses
        Members of each trained set, sorted, and its dose (NaN: none) ``[R]``.
    general
        ``[R, G]``: effects over all contexts.
    cells
        ``[R]``: perturbed cells that each was measured on.
    own, own_of
        ``[Q, G]``: how effects in contexts differ from the general ones, and ``[Q, 2]``: context and set.
    pool
        The contexts ``[C]``.
    contexts
        Numbers of the C contexts as they were given.
    pooling
        Factors that were fitted.
    feature_axes, feature_weights, codes
        See :class:`bgen.models.generators.average_effects.AverageEffects`.
    """

    sets: list[tuple[str, ...]]
    doses: F64
    general: F32
    cells: F32
    own: F32
    own_of: NDArray[np.int64]
    pool: ContextPool
    contexts: list[int] = field(default_factory=list)
    pooling: EffectPooling = field(default_factory=EffectPooling)
    feature_axes: F32 = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    feature_weights: F32 = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    codes: F32 = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    @classmethod
    def of_tables(cls, tables: AverageEffects, of: Sequence[EffectOf], pooling: EffectPooling) -> Effects:
        """Return the effects that a model holds."""
        held = tables.named_buffers()
        read: dict[str, Any] = {name: table.cpu().numpy() for name, table in held if name != "network"}
        width = np.inf if pooling.width is None else pooling.width
        noise = read.pop("control_noise").astype(np.float64)
        pool = ContextPool(read.pop("control"), noise, read.pop("control_off"), width)
        return cls(
            sets=[tuple(one.set) for one in of],
            doses=np.array([np.nan if one.dose is None else one.dose for one in of], np.float64),
            pool=pool,
            pooling=pooling,
            **read,
        )

    def tables(self, network: F32 | None = None) -> AverageEffects:
        """Return what a model has to hold; ``network [E', G]`` is what is known of regulators."""
        regulated = np.zeros((0, self.general.shape[1]), np.float32) if network is None else network
        held = {
            "general": self.general,
            "cells": self.cells,
            "own": self.own,
            "own_of": self.own_of,
            "control": self.pool.logs,
            "control_noise": self.pool.noise.astype(np.float32),
            "control_off": self.pool.off,
            "feature_axes": self.feature_axes.reshape(-1, self.general.shape[1]),
            "feature_weights": self.feature_weights.reshape(-1, self.general.shape[1]),
            "codes": self.codes,
            "network": regulated,
        }
        return AverageEffects({name: torch.from_numpy(np.ascontiguousarray(table)) for name, table in held.items()})

    def with_share(self, share: float) -> Effects:
        """Return the same with another share of the flow's own answer."""
        return replace(self, pooling=self.pooling.model_copy(update={"flow": share}))

    def with_others(self, others: Effects, controls: Controls) -> Effects:
        """Return the same with the effects of sets that only ``others`` know, as they would be on control cells.

        Others of a model with fewer genes, the same first, know nothing of the further ones.
        """
        new = [row for row, names in enumerate(others.sets) if names not in {*self.sets}]
        if not new:
            return self
        size = others.general.shape[1]
        general = np.zeros((len(new), self.general.shape[1]), np.float32)
        general[:, :size] = others.at(new, Controls(controls.mean[:size], controls.variance[:size]))
        codes = self.codes
        if len(codes):  # what the bilinear form makes of them is in their effects
            codes = np.concatenate([codes, np.zeros((len(new), codes.shape[1]), np.float32)])
        return replace(
            self,
            sets=[*self.sets, *(others.sets[row] for row in new)],
            doses=np.concatenate([self.doses, others.doses[new]]),
            general=np.concatenate([self.general, general]),
            cells=np.concatenate([self.cells, others.cells[new]]),
            codes=codes,
        )

    def named(self) -> list[EffectOf]:
        """Return what each of the R is of."""
        doses = [None if np.isnan(dose) else float(dose) for dose in self.doses]
        return [EffectOf(set=list(names), dose=dose) for names, dose in zip(self.sets, doses, strict=True)]

    def of(
        self,
        parts: Sequence[str],
        dose: float | None,
        controls: Controls | None = None,
        flow: F64 | None = None,
        members: Known | None = None,
    ) -> F64:
        """Return the effect ``[G]`` of a set on control cells.

        Parameters
        ----------
        dose
            In the unit of training; None: none.
        controls
            The average of the control cells; None: of no context in particular.
        flow
            ``[G]``: the flow's own change of these cells' average on the same scale; None: it is not asked.
        members
            For sets with a member that was not trained on.
        """
        joined = self._of(parts, dose, controls, flow, members)
        return joined if controls is None else joined + self.pool.errors(controls)

    def _of(
        self,
        parts: Sequence[str],
        dose: float | None,
        controls: Controls | None,
        flow: F64 | None,
        members: Known | None,
    ) -> F64:
        names = tuple(sorted(parts))
        own = self._trained(names, dose, controls)
        if own is not None:
            return self.joined(own, flow, self._seen(names, controls))
        single = {name: self._trained((name,), dose, controls) for name in names}
        total = np.zeros(self.general.shape[1])
        for name, one in single.items():
            total += self.unseen(name, controls, members) if one is None else one
        if len(names) > 1:
            total *= self.pooling.pairs
        return self.joined(total, None if any(one is None for one in single.values()) else flow)

    def joined(self, effect: F64, flow: F64 | None, seen: float = 0.0) -> F64:
        """Return the average ``m`` of an effect ``e`` and the flow's ``f``, all ``[G]``.

        Each has the right size if its errors are not correlated with it, that is ``<e, t> = <e, e>`` for the truth t.
        Their average is then too small, the more the less they agree, and is enlarged:

            m = (1 - w) e + w f,    m <m, t> / <m, m> = m ((1 - w) <e, e> + w <f, f>) / <m, m>

        Where both have ``seen`` the set in this context, they have learnt the same cells with their errors, and it is
        not (0: not seen, 1: seen).
        """
        share = self.pooling.flow
        if flow is None or share == 0:
            return effect
        mean = (1 - share) * effect + share * flow
        size = float(mean @ mean)
        expected = (1 - share) * float(effect @ effect) + share * float(flow @ flow)
        larger = expected / size if size > 0 else 1.0
        found: F64 = (seen + (1 - seen) * min(larger, MOST_LARGER)) * mean
        return found

    def at(self, rows: Sequence[int], controls: Controls | None) -> F64:
        """Return the effects ``[len(rows), G]`` of trained sets on control cells."""
        found = self.general[list(rows)].astype(np.float64)
        if controls is None or not len(self.pool.logs):
            return found
        distances = self.pool.distances(controls)
        bilinear = self._bilinear(controls) if self.pooling.bilinear else None
        for place, row in enumerate(rows):
            here = np.flatnonzero(self.own_of[:, 1] == row)
            if not len(here):
                continue
            seen, unseen, sure = self.pool.weights(distances, self.own_of[here, 0])
            elsewhere = (1 - self.pooling.bilinear) * unseen if bilinear is not None else unseen
            found[place] += (sure * seen + (1 - sure) * elsewhere) @ self.own[here].astype(np.float64)
            if bilinear is not None:
                turned = np.outer(bilinear, self.codes[row]).ravel() @ self.feature_weights
                found[place] += (1 - sure) * self.pooling.bilinear * turned
        return found

    def unseen(self, name: str, controls: Controls | None, members: Known | None) -> F64:
        """Return the effect ``[G]`` of a single perturbation that was not trained on."""
        members = members or Known()
        rows = [row for row, names in enumerate(self.sets) if len(names) == 1]
        if not rows:
            return np.zeros(self.general.shape[1])
        names, values, weight = self._singles(self.at(rows, controls), rows)
        target = members.targets.get(name, -1)
        base = self._base(controls)
        predicted = predict_unseen(values, weight, names, name, members, base)
        if target >= 0 and self.pooling.knock_down is not None:
            predicted[target] = np.log1p(base[target] * np.exp(self.pooling.knock_down)) - np.log1p(base[target])
        return predicted

    def _base(self, controls: Controls | None) -> F64:
        """Return counts per 10,000 of the average control cell ``[G]``."""
        if controls is not None:
            return controls.mean
        if not len(self.pool.logs):
            return np.zeros(self.general.shape[1])
        found: F64 = np.expm1(self.pool.logs.astype(np.float64)).mean(0)
        return found

    def _singles(self, values: F64, rows: Sequence[int]) -> tuple[list[str], F64, F64]:
        """Return names, effects ``[P, G]`` over all doses, and cells ``[P]`` of single perturbations."""
        names = list(dict.fromkeys(self.sets[row][0] for row in rows))
        number = np.array([names.index(self.sets[row][0]) for row in rows])
        cells = np.maximum(self.cells[list(rows)].astype(np.float64), 1e-6)
        total = np.bincount(number, cells, len(names)).astype(np.float64)
        share = np.zeros((len(names), len(rows)))
        share[number, np.arange(len(rows))] = cells / total[number]
        return names, share @ values, total

    def _trained(self, members: tuple[str, ...], dose: float | None, controls: Controls | None) -> F64 | None:
        rows = [row for row, names in enumerate(self.sets) if names == members]
        if not rows:
            return None
        doses, values = self.doses[rows], self.at(rows, controls)
        if dose is None or np.isnan(doses).all():
            mean: F64 = values.mean(0)
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
        between: F64 = (1 - part) * values[above - 1] + part * values[above]
        return between

    def _seen(self, members: tuple[str, ...], controls: Controls | None) -> float:
        """Return how sure it is that control cells are those of a context in which a set was trained on."""
        if controls is None or not len(self.pool.logs):
            return 0.0
        rows = [row for row, names in enumerate(self.sets) if names == members]
        only = np.zeros(1, np.int64) if len(self.pool.logs) == 1 else self.own_of[np.isin(self.own_of[:, 1], rows), 0]
        return self.pool.weights(self.pool.distances(controls), only)[2] if len(only) else 0.0

    def _bilinear(self, controls: Controls) -> F64:
        """Return the features ``[K]`` of control cells."""
        found: F64 = self.feature_axes @ (controls.logs - self.pool.logs.mean(0))
        return found


def predict_unseen(values: F64, weight: F64, names: Sequence[str], name: str, members: Known, base: F64) -> F64:
    """Predict the effect ``[G]`` of a perturbation from those of others, ``values [P, G]`` of ``names``.

    What others do to their own targets is left out: it is particular to each. ``weight [P]``: how much each counts;
    ``base [G]``: counts per 10,000 of the average control cell, for the network's prediction.
    """
    every, weight = values.copy(), weight / weight.sum()
    mean = weight @ every
    places = np.array([members.targets.get(other, -1) for other in names])
    hit = np.flatnonzero(places >= 0)
    every[hit, places[hit]] = mean[places[hit]]
    mean = weight @ every
    known = np.array([at for at, other in enumerate(names) if other in members.vectors], np.int64)
    if len(known) < LEAST_TARGETS or name not in members.vectors:
        return mean
    y, w = every[known], weight[known] / weight[known].mean()
    x, at = np.array([members.vectors[names[row]] for row in known], np.float64), members.vectors[name]
    predicted = np.zeros(y.shape[1])
    if members.network is not None and len(members.network):
        slope = base / (1 + base)  # of log(1 + m), where log m changes
        regulated = np.concatenate([x, at[None]])[:, -len(members.network) :] @ members.network * slope
        share = _share(regulated[:-1], y)
        y = y - share * regulated[:-1]
        predicted += share * regulated[-1]
    mean = w @ y / w.sum()
    return predicted + mean + _ridge(x, y - mean, w, at.astype(np.float64))


def _share(x: F64, y: F64) -> float:
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


def _ridge(x: F64, y: F64, weight: F64, at: F64) -> F64:
    """Predict ``[G]`` at a vector ``[E]`` from ``x [P, E]`` and ``y [P, G]``, of weighted mean 0.

    Rows of small weight count as noisier in proportion.
    """
    centre = weight @ x / weight.sum()
    x = x - centre
    kernel = x @ x.T
    best, chosen = np.inf, np.inf
    mean = np.tile(weight / weight.sum(), (len(x), 1))
    for ridge in RIDGES:
        hat = mean.copy()  # the intercept
        if not np.isinf(ridge):
            hat += kernel @ np.linalg.inv(kernel + ridge * np.diag(1 / weight)) @ (np.eye(len(x)) - mean)
        left_out = (y - hat @ y) / np.maximum(1 - np.diag(hat), 1e-3)[:, None]
        error = float((weight[:, None] * left_out**2).sum())
        if error < best:
            best, chosen = error, ridge
    if np.isinf(chosen):
        return np.zeros(y.shape[1])
    predicted: F64 = np.linalg.solve(kernel + chosen * np.diag(1 / weight), x @ (at - centre)) @ y
    return predicted
