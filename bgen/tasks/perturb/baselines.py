"""Effects that need no model: what a prediction of a held-out perturbation has to be better than.

All are differences of mean log(1 + counts per 10,000) between perturbed and control cells of the same strata, estimated
from the training cells. Each function is one baseline; :mod:`bgen.effects.contexts` has those that look
at where cells come from.

Axes: R trained sets with their dose, G genes, D components, N cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.arrays import F64, I64
from bgen.effects.contexts import Key, left_out_errors
from bgen.effects.estimates import control_weights
from bgen.genes.table import find_genes

TRAIN_MEAN, WEIGHTED_MEAN = "train mean", "train mean, by cells"
SAME, ADDITIVE = "same in training", "additive"
NEAREST_DOSE, AVERAGE_DOSE = "nearest dose", "average dose"
LATENT_SHIFT, GENE_SETS = "latent shift", "gene sets"

SHIFT_COMPONENTS = 50
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, np.inf)


@dataclass(frozen=True)
class TrainedEffects:
    """What the training cells say: ``keys`` (R), their effects ``values [R, G]``, ``cells [R]`` and target genes."""

    keys: list[Key]
    values: F64
    cells: I64
    targets: list[I64]

    def some(self, kept: Sequence[bool]) -> TrainedEffects:
        """Return some of the R."""
        rows = np.flatnonzero(kept)
        return TrainedEffects(
            [self.keys[row] for row in rows], self.values[rows], self.cells[rows], [self.targets[row] for row in rows]
        )

    def of(self, key: Key) -> F64 | None:
        """Return the effect ``[G]`` of a key, if it is there."""
        return self.values[self.keys.index(key)] if key in self.keys else None


def measure_effects(logs: sp.csr_matrix, groups: Sequence[I64], control: I64, stratum: I64) -> F64:
    """Return the differences ``[R, G]`` of mean logarithms ``[N, G]`` of groups of cells and control cells.

    Within strata: control cells weigh such that strata have the proportions of each group. The same as
    :func:`bgen.effects.estimates.log_effect` of each group, in two products of matrices.
    """
    if not groups:
        return np.zeros((0, logs.shape[1]))
    sizes = [len(rows) for rows in groups]
    rows = np.repeat(np.arange(len(groups)), sizes)
    share = np.repeat(1 / np.maximum(sizes, 1), sizes)
    perturbed = sp.csr_matrix((share, (rows, np.concatenate(groups))), (len(groups), logs.shape[0]))
    kinds, place = np.unique(stratum, return_inverse=True)
    pools = [control[stratum[control] == kind] for kind in kinds]
    pools = [pool if len(pool) else control for pool in pools]  # without controls: compared with all, as everywhere
    lengths = [len(pool) for pool in pools]
    means = sp.csr_matrix(
        (
            np.repeat(1 / np.maximum(lengths, 1), lengths),
            (np.repeat(np.arange(len(kinds)), lengths), np.concatenate(pools)),
        ),
        (len(kinds), logs.shape[0]),
    )
    of_stratum = sp.csr_matrix((np.ones(len(stratum)), (np.arange(len(stratum)), place)), (len(stratum), len(kinds)))
    doubles = logs.astype(np.float64)
    effects: F64 = (perturbed @ doubles - (perturbed @ of_stratum) @ (means @ doubles)).toarray()
    return effects


def mean_effect(trained: TrainedEffects, *, by_cells: bool) -> tuple[F64, float]:
    """Return the average effect ``[G]``, and the average effect of targets on themselves (0 if none is measured).

    At each gene it is that of the perturbations of other genes: a knock-down of its own is particular to the target,
    and would make every other prediction wrong there. ``by_cells``: perturbations weigh as they have cells.
    """
    weight = trained.cells.astype(np.float64) if by_cells else np.ones(len(trained.keys))
    weights = np.repeat(weight[:, None], trained.values.shape[1], 1)
    own, sizes = 0.0, 0.0
    for row, genes in enumerate(trained.targets):
        weights[row, genes] = 0
        own += float(weight[row] * trained.values[row, genes].sum())
        sizes += float(weight[row] * len(genes))
    total = weights.sum(0)
    mean: F64 = np.where(
        total > 0, (weights * trained.values).sum(0) / np.maximum(total, 1e-12), np.average(trained.values, 0, weight)
    )
    return mean, own / sizes if sizes else 0.0


def with_own(effect: F64, targets: I64, own: float) -> F64:
    """Return an effect ``[G]`` with a typical knock-down at the targets."""
    changed = effect.copy()
    if own:
        changed[targets] = own
    return changed


def additive(key: Key, trained: TrainedEffects) -> F64 | None:
    """Return the sum of the members' effects; None for one perturbation, or if a member was not trained on."""
    parts = [trained.of(((name,), key[1])) for name in key[0]]
    known = [part for part in parts if part is not None]
    return np.sum(known, axis=0) if len(parts) == len(known) > 1 else None


def nearest_dose(key: Key, keys: Iterable[Key]) -> Key | None:
    """Return the trained dose above 0 of the same set that is nearest on a logarithmic scale, if there is one."""
    dose = key[1]
    others = {other[1]: other for other in keys if other[0] == key[0] and other[1]}
    if not dose or not others:
        return None
    return others[min(others, key=lambda other: abs(np.log(other / dose)))]


def average_dose(key: Key, trained: TrainedEffects) -> F64 | None:
    """Return the mean over the other trained doses above 0 of the same set, weighted by cells; None without any."""
    rows = [row for row, other in enumerate(trained.keys) if other[0] == key[0] and other[1] and other != key]
    if key[1] is None or not rows:
        return None
    mean: F64 = np.average(trained.values[rows], 0, trained.cells[rows])
    return mean


def latent_shift(
    logs: sp.csr_matrix, perturbed: I64, control: I64, stratum: I64, components: NDArray[np.float32]
) -> F64:
    """Return the difference ``[G]`` of means in principal components ``[D, G]``, every stratum weighing the same.

    scGen's arithmetic (Lotfollahi et al., Nat. Methods 2019) with principal components as the latent space.
    """
    shifts = []
    for number in np.unique(stratum[perturbed]):
        own, pool = perturbed[stratum[perturbed] == number], control[stratum[control] == number]
        if len(pool):
            parts = [np.asarray(logs[rows].mean(0, dtype=np.float64)).ravel() for rows in (own, pool)]
            shifts.append(parts[0] - parts[1])
    if not shifts:
        mean = np.asarray(logs[perturbed].mean(0, dtype=np.float64)).ravel()
        shifts.append(mean - logs[control].T @ control_weights(perturbed, control, stratum))
    axes = components.astype(np.float64)
    shift: F64 = (axes @ np.mean(shifts, axis=0)) @ axes
    return shift


def gene_set_ridge(trained: TrainedEffects, rows: F64, at: F64) -> F64 | None:
    """Predict the effect ``[G]`` of a target from the gene sets that it shares with others.

    Kernel ridge regression on the cosine of membership rows, each perturbation weighing by its cells; the strength is
    the one that predicts left-out perturbations best, which may be the average alone. Own knock-downs are left out
    beforehand, as in :func:`mean_effect`.

    Parameters
    ----------
    rows, at
        Memberships of the R trained targets, and of the one to predict. Rows of zeros: not in any set.

    Returns
    -------
    array or None
        None if the target is in no set, or fewer than three of the trained ones are.
    """
    if not at.any() or (rows.any(1)).sum() < 3:
        return None
    mean, _ = mean_effect(trained, by_cells=True)
    y = trained.values - mean
    for row, genes in enumerate(trained.targets):
        y[row, genes] = 0
    every = np.vstack([rows, at])
    every = every / np.maximum(np.linalg.norm(every, axis=1, keepdims=True), 1e-12)
    kernel, cross = every[:-1] @ every[:-1].T, every[:-1] @ every[-1]
    weight = trained.cells / trained.cells.mean()
    products = y @ y.T
    best, chosen = np.inf, np.inf
    for ridge in RIDGES:
        hat = _hat(kernel, np.diag(ridge / weight)) if np.isfinite(ridge) else np.zeros_like(kernel)
        error = float(weight @ left_out_errors(hat, products))
        if error < best:
            best, chosen = error, ridge
    if np.isinf(chosen):
        return mean
    predicted: F64 = mean + np.linalg.solve(kernel + np.diag(chosen / weight), cross) @ y
    return predicted


def _hat(kernel: F64, penalty: F64) -> F64:
    hat: F64 = kernel @ np.linalg.inv(kernel + penalty)
    return hat


def target_genes(keys: Sequence[Key], genes: pd.DataFrame) -> list[I64]:
    """Return the target genes of every key, by a model's gene table."""
    found = [find_genes(genes, key[0]) for key in keys]
    return [some[some >= 0] for some in found]
