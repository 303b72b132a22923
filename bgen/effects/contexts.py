"""Baselines for a context (cell type, donor, line) in which nothing was perturbed, from its control cells alone.

    effect of p in context c  ~  f(mean of the control cells of c, effects of p in the contexts of training)

Strengths are chosen by leaving training contexts out, for all perturbations together. With few contexts the choice is
the mean over them, as it should be.

Axes: C contexts, Q perturbations (with their dose), G genes, K features of a context, R of a perturbation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bgen.arrays import F64

Key = tuple[tuple[str, ...], float | None]
"""Members of a set, sorted, and the dose."""

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

    @cached_property
    def strengths(self) -> tuple[float, float, float]:
        """Sharpness of similar contexts, and the ridges on controls and of the bilinear form (infinite without three
        contexts). Chosen once: they do not depend on whose effects are asked for.
        """
        fitted = len(self.control) > 2
        ridges = (choose_ridge(self), choose_bilinear(self)) if fitted else (np.inf, np.inf)
        return choose_sharpness(self), *ridges

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
    fitted = fit_bilinear(contexts)
    predicted: F64 = fitted.mean + fitted.turn(control, ridge)
    return predicted


def choose_bilinear(contexts: Contexts) -> float:
    """Return the strength for :func:`bilinear_on_controls` that predicts left-out contexts best."""
    errors = np.zeros(len(RIDGES))
    for context in range(len(contexts.control)):
        rest = contexts.without(context)
        real = contexts.effects[context]
        both = np.isfinite(real[:, 0]) & rest.there.any(0)
        fitted = fit_bilinear(rest)
        for at, ridge in enumerate(RIDGES):
            predicted = fitted.mean + fitted.turn(contexts.control[context], ridge)
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
    sharpness, ridge, strength = contexts.strengths
    bilinear = bilinear_on_controls(contexts, control, strength) if len(contexts.control) > 2 else None
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


@dataclass(frozen=True)
class Bilinear:
    """Effects in a context as the mean effect, and what is added by the context's control mean.

        effect of q in c = mean_q + (features of c (x) codes of q) @ weights

    Attributes
    ----------
    mean, codes
        Effects over all contexts ``[Q, G]``, NaN for perturbations that no context has, and their codes ``[Q, R]``.
    centre, axes
        Features of a context are ``axes [K, G]`` times its control mean less ``centre [G]``.
    """

    mean: F64
    codes: F64
    centre: F64
    axes: F64
    square: F64
    products: F64

    def weights(self, ridge: float) -> F64:
        """Return the weights ``[K R, G]``, shrunk by ``ridge``."""
        if np.isinf(ridge):
            return np.zeros(self.products.shape)
        found: F64 = np.linalg.inv(self.square + ridge * np.eye(len(self.square))) @ self.products
        return found

    def turn(self, control: F64, ridge: float) -> F64:
        """Return what is added to the mean effects ``[Q, G]`` in a context."""
        features = np.repeat((self.axes @ (control - self.centre))[None], len(self.codes), 0)
        added: F64 = _outer(features, self.codes) @ self.weights(ridge)
        return added


def fit_bilinear(contexts: Contexts) -> Bilinear:
    """Fit the form to contexts by least squares; see :func:`bilinear_on_controls`."""
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
    return Bilinear(mean, codes, centre, axes / size, square, products)


def _outer(x: F64, y: F64) -> F64:
    return np.einsum("nk,nr->nkr", x, y).reshape(len(x), x.shape[1] * y.shape[1])


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


def left_out_errors(hat: F64, products: F64) -> F64:
    """Return the squared error ``[n]`` of predicting each of n observations without it by a linear fit ``hat [n, n]``.

    ``products [n, n]`` are those of observations with one another: y y^T.
    """
    residual = np.eye(len(hat)) - hat
    errors: F64 = np.einsum("ij,jk,ik->i", residual, products, residual) / np.maximum(1 - np.diag(hat), 1e-3) ** 2
    return errors
