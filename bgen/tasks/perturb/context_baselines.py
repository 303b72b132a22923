"""Baselines for a context (cell type, donor, line) in which nothing was perturbed, from its control cells alone.

    effect of p in context c  ~  f(mean of the control cells of c, effects of p in the contexts of training)

Strengths are chosen by leaving training contexts out, for all perturbations together. With few contexts the choice is
the mean over them, as it should be.

Axes: C contexts, Q perturbations (with their dose), G genes, K features of a context, R of a perturbation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bgen.arrays import F64
from bgen.tasks.perturb.baselines import left_out_errors
from bgen.tasks.perturb.keys import Key

NEAREST, SIMILAR, RIDGE, BILINEAR = "nearest context", "similar contexts", "ridge on controls", "bilinear on controls"
FEATURES = 8
"""Principal components of control means, at most: K."""

RANK = 12
"""Principal directions of mean effects by which perturbations are told apart: R."""

SHARPNESS = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Of weights exp(-sharpness d^2 / mean d^2); 0: the mean."""

RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, np.inf)


@dataclass(frozen=True)
class Contexts:
    """Training contexts.

    Attributes
    ----------
    control
        Mean logarithm ``[C, G]`` of the control cells of each.
    effects
        ``[C, Q, G]``, NaN where a context lacks a perturbation.
    keys
        The Q.
    """

    control: F64
    effects: NDArray[np.float32]
    keys: list[Key]

    @property
    def there(self) -> NDArray[np.bool_]:
        """Which perturbations each context has ``[C, Q]``."""
        return np.isfinite(self.effects[:, :, 0])

    def without(self, context: int) -> Contexts:
        """Leave one out."""
        return Contexts(np.delete(self.control, context, 0), np.delete(self.effects, context, 0), self.keys)

    def of(self, perturbation: int) -> Contexts:
        """Return the contexts that have a perturbation, and it alone."""
        kept = self.there[:, perturbation]
        return Contexts(self.control[kept], self.effects[kept, perturbation][:, None], [self.keys[perturbation]])

    def products(self, perturbation: int) -> F64:
        """Return the products of the effects of one perturbation in its contexts with one another."""
        effects = self.effects[self.there[:, perturbation], perturbation].astype(np.float64)
        found: F64 = effects @ effects.T
        return found


def nearest_context(contexts: Contexts, control: F64, perturbation: int) -> F64:
    """Return the effect ``[G]`` in the context whose control mean is nearest to ``control [G]``."""
    own = contexts.of(perturbation)
    nearest: F64 = own.effects[int(np.argmin(((own.control - control) ** 2).sum(1))), 0].astype(np.float64)
    return nearest


def similar_contexts(contexts: Contexts, control: F64, perturbation: int, sharpness: float) -> F64:
    """Return the mean ``[G]`` of effects weighted by exp(-sharpness d^2 / mean d^2), d the distance to ``control``."""
    own = contexts.of(perturbation)
    distance = ((own.control - control) ** 2).sum(1)
    effect: F64 = _weights(distance[None], _typical(contexts.control), sharpness)[0] @ own.effects[:, 0]
    return effect


def choose_sharpness(contexts: Contexts) -> float:
    """Return the sharpness for :func:`similar_contexts` that predicts left-out contexts best."""
    typical = _typical(contexts.control)

    def hat(control: F64, sharpness: float) -> F64:
        distance = ((control[:, None] - control) ** 2).sum(2)
        np.fill_diagonal(distance, np.inf)
        return _weights(distance, typical, sharpness)

    return _choose(contexts, SHARPNESS, hat)


def ridge_on_controls(contexts: Contexts, control: F64, perturbation: int, ridge: float) -> F64:
    """Predict the effect ``[G]`` by ridge regression on the control mean, for each perturbation by itself."""
    own = contexts.of(perturbation)
    effects = own.effects[:, 0].astype(np.float64)
    mean = effects.mean(0)
    if np.isinf(ridge):
        return mean
    centre, scale = own.control.mean(0), _spread(contexts.control)
    rows, at = (own.control - centre) / scale, (control - centre) / scale
    weights = np.linalg.solve(rows @ rows.T + ridge * np.eye(len(rows)), rows @ at)
    predicted: F64 = mean + weights @ (effects - mean)
    return predicted


def choose_ridge(contexts: Contexts) -> float:
    """Return the strength for :func:`ridge_on_controls` that predicts left-out contexts best."""
    scale = _spread(contexts.control)

    def hat(control: F64, ridge: float) -> F64:
        n = len(control)
        rows = (control - control.mean(0)) / scale
        mean = np.full((n, n), 1 / n)
        kernel = rows @ rows.T
        return mean if np.isinf(ridge) else mean + kernel @ np.linalg.inv(kernel + ridge * np.eye(n))

    return _choose(contexts, RIDGES, hat)


def bilinear_on_controls(contexts: Contexts, control: F64, ridge: float) -> F64:
    """Predict ``[Q, G]`` effects as (I + M(control mean)) times the mean effect, M linear and the same for all.

    M sees the first R directions of mean effects, and is fitted by ridge regression over contexts and perturbations.
    """
    return _bilinear(contexts, control, (ridge,))[0]


def choose_bilinear(contexts: Contexts) -> float:
    """Return the strength for :func:`bilinear_on_controls` that predicts left-out contexts best."""
    errors = np.zeros(len(RIDGES))
    for context in range(len(contexts.control)):
        rest = contexts.without(context)
        real = contexts.effects[context]
        both = np.isfinite(real[:, 0]) & rest.there.any(0)
        for at, predicted in enumerate(_bilinear(rest, contexts.control[context], RIDGES)):
            errors[at] += float(((predicted[both] - real[both]) ** 2).sum())
    return RIDGES[_least(errors)]


def context_effects(contexts: Contexts, control: F64, keys: Sequence[Key]) -> dict[Key, dict[str, F64]]:
    """Return the baselines that there are for perturbations ``keys`` of a context with the control mean ``[G]``.

    Two contexts are needed for the nearest and for similar ones, three for what is fitted.
    """
    found: dict[Key, dict[str, F64]] = {}
    chosen = [key for key in keys if key in contexts.keys and contexts.there[:, contexts.keys.index(key)].sum() > 1]
    if not chosen:
        return found
    sharpness, fitted = choose_sharpness(contexts), len(contexts.control) > 2
    ridge = choose_ridge(contexts) if fitted else np.inf
    bilinear = bilinear_on_controls(contexts, control, choose_bilinear(contexts)) if fitted else None
    for key in chosen:
        at = contexts.keys.index(key)
        rows = {
            NEAREST: nearest_context(contexts, control, at),
            SIMILAR: similar_contexts(contexts, control, at, sharpness),
        }
        if bilinear is not None:
            rows |= {RIDGE: ridge_on_controls(contexts, control, at, ridge), BILINEAR: bilinear[at]}
        found[key] = rows
    return found


def _bilinear(contexts: Contexts, control: F64, ridges: Sequence[float]) -> list[F64]:
    """Return predictions ``[Q, G]`` for each strength, NaN for perturbations that no context has."""
    there = contexts.there
    counts = there.sum(0)
    effects = np.nan_to_num(contexts.effects).astype(np.float64)
    mean = np.where(counts[:, None] > 0, effects.sum(0) / np.maximum(counts, 1)[:, None], np.nan)
    directions = np.linalg.svd(np.nan_to_num(mean), full_matrices=False)[2][:RANK]  # [R, G]
    codes = np.nan_to_num(mean) @ directions.T  # [Q, R]
    codes /= max(float(np.sqrt((codes**2).sum(1).mean())), 1e-12)
    centre = contexts.control.mean(0)
    axes = np.linalg.svd(contexts.control - centre, full_matrices=False)[2][: min(FEATURES, len(contexts.control) - 1)]
    features = (contexts.control - centre) @ axes.T  # [C, K]
    size = max(float(np.sqrt((features**2).sum(1).mean())), 1e-12)
    square = np.zeros((features.shape[1] * codes.shape[1],) * 2)
    products = np.zeros((len(square), mean.shape[1]))
    for context, kept in enumerate(there):
        x = _outer(np.repeat(features[context : context + 1] / size, kept.sum(), 0), codes[kept])
        square += x.T @ x
        products += x.T @ (effects[context, kept] - mean[kept])
    at = _outer(np.repeat(((control - centre) @ axes.T / size)[None], len(mean), 0), codes)
    made = []
    for ridge in ridges:
        if np.isinf(ridge):
            made.append(mean)
        else:
            made.append(mean + at @ np.linalg.solve(square + ridge * np.eye(len(square)), products))
    return made


def _outer(x: F64, y: F64) -> F64:
    return np.einsum("nk,nr->nkr", x, y).reshape(len(x), -1)


def _choose(contexts: Contexts, strengths: Sequence[float], hat: Callable[[F64, float], F64]) -> float:
    """Return the strength with the least squared error for left-out contexts, over all perturbations."""
    errors = np.zeros(len(strengths))
    there = contexts.there
    for number in np.flatnonzero(there.sum(0) > 1):
        control, products = contexts.control[there[:, number]], contexts.products(int(number))
        for at, strength in enumerate(strengths):
            errors[at] += left_out_errors(hat(control, strength), products).sum()
    return strengths[_least(errors)]


def _least(errors: F64) -> int:
    """Return the place of the least error; where several are as good as equal, of the first."""
    return int(np.flatnonzero(errors <= errors.min() * (1 + 1e-9))[0])


def _weights(distance: F64, typical: float, sharpness: float) -> F64:
    """Return weights of rows of squared distances, of sum 1; none at an infinite distance."""
    score = np.where(
        np.isfinite(distance), -sharpness * np.where(np.isfinite(distance), distance, 0) / typical, -np.inf
    )
    weights = np.exp(score - score.max(1, keepdims=True))
    found: F64 = weights / weights.sum(1, keepdims=True)
    return found


def _typical(control: F64) -> float:
    """Return the mean squared distance between contexts."""
    return max(2 * float(control.var(0, ddof=1).sum()), 1e-12)


def _spread(control: F64) -> float:
    return max(float(np.sqrt(control.var(0).sum())), 1e-12)


def read_contexts(control: Mapping[int, F64], effects: Mapping[int, Mapping[Key, F64]]) -> Contexts:
    """Return contexts by number, with the mean logarithm of control cells and the effects of each."""
    numbers = sorted(control)
    keys = list(dict.fromkeys(key for number in numbers for key in effects[number]))
    genes = len(next(iter(control.values())))
    values = np.full((len(numbers), len(keys), genes), np.nan, np.float32)
    for row, number in enumerate(numbers):
        for column, key in enumerate(keys):
            if key in effects[number]:
                values[row, column] = effects[number][key]
    return Contexts(np.array([control[number] for number in numbers]), values, keys)
