"""Estimates average effects from the moments of groups of cells, honestly pooled.

For a set p in a context c, from control cells of the same context, on the scale log(1 + counts per 10,000):

    d_pc = log(1 + m_pc) - log(1 + b_c),    s_pc^2 = var m_pc / (1 + m_pc)^2 + var b_c / (1 + b_c)^2

The general effect is the mean over contexts, each weighted by its cells, shrunk by :func:`shrink`: towards no effect;
for combinations, towards the sum of their members times a factor; for doses of a drug, towards their common direction.
What differs in a context is shrunk towards nothing. Where a context has no control cells, those of all contexts stand
in.

The width over which contexts are alike, and whether the bilinear form is used, are chosen by leaving contexts out.

Axes: R sets with their dose, Q sets in contexts, C contexts, G genes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bgen.arrays import F32, F64, I64
from bgen.effects.context_pool import ContextPool, kernel
from bgen.effects.contexts import RIDGES as BILINEAR_RIDGES
from bgen.effects.contexts import Contexts, Key, fit_bilinear
from bgen.effects.effects import Effects, Known
from bgen.effects.estimates import shrink
from bgen.effects.moments import CONTROL, GroupMoments
from bgen.hub.about import EffectPooling

LEAST_CELLS = 2
"""Perturbed cells of a set in a context, below which they say nothing."""

WIDTHS = (np.inf, 2.0, 1.0, 0.5, 0.25, 0.12, 0.06, 0.03)
"""In units of the median square of the distance between contexts."""

LEAST_CONTEXTS = 4
"""Contexts needed for the bilinear form."""

SOFT = 0.02
"""Added to the variances of effects of left-out contexts, so that a few precise genes do not decide."""

SHARES = (0.5, 1.0)
"""Of the bilinear form, beside the weighted average."""

SURE = 2.0
"""Standard errors, between contexts, by which it has to be better."""

MOST_SETS, MOST_GENES = 64, 2000
"""Sets and genes that widths are chosen by."""

LEAST_LABELS = 3
LIMITS = (0.0, 1.5)


@dataclass(frozen=True)
class Estimates:
    """Effects of sets in contexts as measured.

    Attributes
    ----------
    context, row
        Numbers ``[Q]`` of the context and the set.
    effect, of_perturbed, of_control
        ``[Q, G]``: effects, and the squares of their standard errors from either side.
    cells
        Perturbed cells ``[Q]``.
    weight
        ``[Q]``: cells on both sides, 1 / (1 / perturbed + 1 / control).
    """

    context: I64
    row: I64
    effect: F32
    of_perturbed: F32
    of_control: F32
    cells: I64
    weight: F64

    @property
    def variance(self) -> F32:
        """Squares of standard errors ``[Q, G]``."""
        return self.of_perturbed + self.of_control


def measure(moments: GroupMoments) -> tuple[Estimates, ContextPool, list[int]]:
    """Return effects in contexts, the contexts' control cells, and their numbers.

    Contexts are numbered anew, those that have both control and perturbed cells, in ascending order; an effect that is
    measured against the control cells of all contexts has context -1.
    """
    control = np.flatnonzero(moments.label == CONTROL)
    perturbed = np.flatnonzero((moments.label != CONTROL) & (moments.cells >= LEAST_CELLS))
    has = {int(moments.context[at]): at for at in control}
    kept = sorted({int(context) for context in moments.context[perturbed]} & has.keys())
    mean, variance = moments.some(control).pooled()
    logs = np.log1p(moments.mean[[has[context] for context in kept]])
    errors = [moments.variance[has[context]] / (1 + moments.mean[has[context]]) ** 2 for context in kept]
    noise = np.array([error.sum(dtype=np.float64) for error in errors])
    pool = ContextPool(logs, noise, np.zeros_like(logs))
    everywhere = np.log1p(mean), variance / (1 + mean) ** 2, int(moments.cells[control].sum())
    place = {context: number for number, context in enumerate(kept)}
    effect, of_control = np.zeros((2, len(perturbed), moments.mean.shape[1]), np.float32)
    here = np.array([place.get(int(context), -1) for context in moments.context[perturbed]], np.int64)
    weight = np.zeros(len(perturbed))
    for at, (group, number) in enumerate(zip(perturbed, here, strict=True)):
        base, error, n = everywhere if number < 0 else (logs[number], errors[number], moments.cells[has[kept[number]]])
        effect[at] = np.log1p(moments.mean[group]) - base
        of_control[at] = error
        weight[at] = 1 / (1 / moments.cells[group] + 1 / n)
    of_perturbed = moments.variance[perturbed] / (1 + moments.mean[perturbed]) ** 2
    cells = moments.cells[perturbed]
    return Estimates(here, moments.label[perturbed], effect, of_perturbed, of_control, cells, weight), pool, kept


def fit_effects(
    moments: GroupMoments,
    sets: Sequence[tuple[str, ...]],
    doses: F64,
    members: Known | None = None,
) -> Effects:
    """Estimate the effects of sets of perturbations.

    Parameters
    ----------
    moments
        Labels are numbers of ``sets``, -1 for control cells.
    sets, doses
        Members of each, sorted, and its dose (NaN: none) ``[R]``.
    members
        The target genes of perturbations, for what they do to their own.
    """
    every = [tuple(names) for names in sets]
    found, pool, contexts = measure(moments)
    genes = moments.mean.shape[1]
    general, kept = np.zeros((2, len(every), genes))
    raw = [_mean(found, np.flatnonzero(found.row == row)) for row in range(len(every))]
    shapes = _shapes(found, every)
    factor = 1.0
    sizes = sorted({len(names) for names in every})
    for size in sizes:  # combinations after their members
        rows = [row for row in range(len(every)) if len(every[row]) == size and raw[row] is not None]
        expected = {row: np.zeros(genes) for row in rows}
        if size > 1:
            expected = {row: _sum(every, doses, general, row) for row in rows}
            factor = factor if size > 2 else _pair_factor([(expected[row], raw[row]) for row in rows])
        for row in rows:
            estimate, variance = raw[row]  # type: ignore[misc]
            error = np.sqrt(variance)
            towards = factor * expected[row]
            if size == 1 and every[row] in shapes:
                towards = _along(shapes[every[row]], estimate, error)
            moved = shrink(estimate - towards, error)
            general[row], kept[row] = towards + moved, _ratio(moved, estimate - towards)
    own, at, kept_own = _differences(found, general)
    cells = np.bincount(found.row, found.cells, len(every)).astype(np.float32)
    effects = Effects(
        sets=every,
        doses=doses,
        general=general.astype(np.float32),
        cells=cells,
        own=own,
        own_of=np.stack([found.context[at], found.row[at]], axis=1),
        pool=pool,
        contexts=contexts,
        pooling=EffectPooling(pairs=factor, knock_down=_knock_down(moments, every, members or Known())),
    )
    effects = replace(effects, pool=replace(pool, off=_off(effects, found)))
    return _choose_contexts(effects, found, kept, at, kept_own)


def _mean(found: Estimates, at: NDArray[np.intp]) -> tuple[F64, F64] | None:
    """Return the mean of effects over contexts ``[G]``, weighted by cells, and the square of its error."""
    if not len(at):
        return None
    weight = found.weight[at] / found.weight[at].sum()
    return weight @ found.effect[at].astype(np.float64), weight**2 @ found.variance[at].astype(np.float64)


def _differences(found: Estimates, general: F64) -> tuple[F32, NDArray[np.intp], F32]:
    """Return how effects in contexts differ from general ones, shrunk ``[Q, G]``; which of the estimates they are of;
    and the share ``[Q, G]`` that shrinking kept.

    A set that was measured in one context has no difference. An effect is a part of the mean that it is compared with,
    so the difference is less noisy than the effect.
    """
    rows: list[int] = []
    own, kept = [], []
    for row in np.unique(found.row):
        at = np.flatnonzero((found.row == row) & (found.context >= 0))
        weight = found.weight[at] / found.weight[at].sum()
        variance = found.variance[at].astype(np.float64)
        of_mean = weight**2 @ variance
        for place, number in enumerate(at) if len(at) > 1 else ():
            away = found.effect[number] - general[row]
            noise = np.maximum((1 - 2 * weight[place]) * variance[place] + of_mean, 1e-12)
            moved = shrink(away, np.sqrt(noise))
            rows.append(int(number))
            own.append(moved.astype(np.float32))
            kept.append(_ratio(moved, away).astype(np.float32))
    shape = (len(rows), general.shape[1])
    at = np.array(rows, np.intp)
    return np.array(own, np.float32).reshape(shape), at, np.array(kept, np.float32).reshape(shape)


def _off(effects: Effects, found: Estimates) -> F32:
    """Return :attr:`bgen.effects.context_pool.ContextPool.off` ``[C, G]``.

    What all effects of a context have in common beyond what is taken for effect is the sampling error of its control
    cells, and that of all its perturbed cells together, in proportion to their variances.
    """
    off = np.zeros_like(effects.pool.logs)
    own = {(int(context), int(row)): at for at, (context, row) in enumerate(effects.own_of)}
    for context in range(len(off)):
        here = np.flatnonzero(found.context == context)
        taken = effects.general[found.row[here]].astype(np.float64)
        for place, row in enumerate(found.row[here]):
            if (context, int(row)) in own:
                taken[place] += effects.own[own[context, int(row)]]
        weight = found.cells[here] / found.cells[here].sum()
        common = weight @ (found.effect[here] - taken)
        of_control, of_perturbed = found.of_control[here[0]], weight**2 @ found.of_perturbed[here].astype(np.float64)
        off[context] = of_control / (of_control + of_perturbed) * common
    return off


@dataclass(frozen=True)
class _LeftOut:
    """One set in a context that is left out.

    Attributes
    ----------
    row
        The set.
    real, certainty
        Its effect there as measured ``[G']``, and what errors at each gene weigh.
    contexts, others
        The contexts that are left, and its effects in them ``[len(contexts), G']``, shrunk without the one left out.
    """

    row: int
    real: F64
    certainty: F64
    contexts: I64
    others: F64


def _leave_out(
    context: int,
    found: Estimates,
    at: NDArray[np.intp],
    rows: I64,
    genes: NDArray[np.intp],
    kept: F64,
    kept_own: F32,
) -> Iterator[_LeftOut]:
    """Yield sets of a context that is left out.

    ``kept [R, G]``, ``kept_own [Q, G]``: shares of general effects and of differences that shrinking kept; they stay
    the same where a context is left out.
    """
    for number in at[(found.context[at] == context) & np.isin(found.row[at], rows)]:
        row = int(found.row[number])
        others = (found.row[at] == row) & (found.context[at] != context)
        effect = found.effect[at[others]][:, genes].astype(np.float64)
        weight = found.weight[at[others]]
        mean = kept[row, genes] * (weight @ effect / weight.sum())
        own = mean + kept_own[others][:, genes] * (effect - mean)
        certainty = 1 / (found.variance[number, genes].astype(np.float64) + SOFT)
        real = found.effect[number, genes].astype(np.float64)
        yield _LeftOut(row, real, certainty, found.context[at[others]], own)


def _choose_contexts(effects: Effects, found: Estimates, kept: F64, at: NDArray[np.intp], kept_own: F32) -> Effects:
    """Choose the width, and whether the bilinear form is used, by leaving contexts out; see :func:`_leave_out`.

    The width is the largest that is not worse than the best by more than a standard error between contexts.
    """
    contexts = np.unique(found.context[at])
    if len(contexts) < 3:
        return effects
    rows = np.sort(np.random.default_rng(0).permutation(np.unique(found.row[at]))[:MOST_SETS])
    genes = np.sort(np.argsort(-effects.pool.logs.mean(0), kind="stable")[:MOST_GENES])
    leave_out = partial(_leave_out, found=found, at=at, rows=rows, genes=genes, kept=kept, kept_own=kept_own)
    between = effects.pool.between()
    median = float(np.median(between[np.triu_indices(len(between), 1)]))
    losses = np.zeros((len(contexts), len(WIDTHS)))
    for number, context in enumerate(contexts.tolist()):
        for one in leave_out(context):
            for place, width in enumerate(WIDTHS):
                weight = kernel(between[context, one.contexts], median * width)
                losses[number, place] += float(((weight @ one.others - one.real) ** 2) @ one.certainty)
    away = losses - losses[:, [int(losses.sum(0).argmin())]]
    chance = np.sqrt(len(contexts) * away.var(0, ddof=1))
    width = median * WIDTHS[int(np.flatnonzero(away.sum(0) <= chance + 1e-9 * losses.sum())[0])]
    pooling = effects.pooling.model_copy(update={"width": None if np.isinf(width) else width})
    effects = replace(effects, pool=replace(effects.pool, width=width), pooling=pooling)
    return effects if len(contexts) < LEAST_CONTEXTS else _try_bilinear(effects, contexts, rows, genes, leave_out)


def _try_bilinear(
    effects: Effects,
    contexts: I64,
    rows: I64,
    genes: NDArray[np.intp],
    leave_out: Callable[[int], Iterator[_LeftOut]],
) -> Effects:
    """Blend the bilinear form in, if it brings effects in left-out contexts closer by more than chance."""
    pool, column = effects.pool, {int(row): at for at, row in enumerate(rows)}
    between, control = pool.between(), pool.logs[:, genes].astype(np.float64)
    finite = BILINEAR_RIDGES[:-1]
    plain, blended = np.zeros(len(contexts)), np.zeros((len(contexts), len(finite), len(SHARES)))
    for place, context in enumerate(contexts.tolist()):
        every = list(leave_out(context))
        values = np.full((len(control), len(rows), len(genes)), np.nan, np.float32)
        for one in every:
            values[one.contexts, column[one.row]] = one.others
        fitted = fit_bilinear(Contexts(control, values, [(effects.sets[row], None) for row in rows]).without(context))
        turned = [fitted.mean + fitted.turn(control[context], ridge) for ridge in finite]
        for one in every:
            average = kernel(between[context, one.contexts], pool.width) @ one.others
            plain[place] += float((average - one.real) ** 2 @ one.certainty)
            for number in range(len(finite)):
                for at, share in enumerate(SHARES):
                    predicted = (1 - share) * average + share * turned[number][column[one.row]]
                    blended[place, number, at] += float((predicted - one.real) ** 2 @ one.certainty)
    number, chosen = (int(at) for at in np.unravel_index(int(np.argmin(blended.sum(0))), blended.shape[1:]))
    gain = plain - blended[:, number, chosen]
    if gain.sum() <= SURE * np.sqrt(len(gain) * gain.var(ddof=1)):
        return effects
    fitted = fit_bilinear(_as_contexts(effects, np.arange(len(effects.sets))))
    form = {"bilinear": SHARES[chosen], "features": len(fitted.axes), "directions": fitted.codes.shape[1]}
    return replace(
        effects,
        pooling=effects.pooling.model_copy(update=form),
        feature_axes=fitted.axes.astype(np.float32),
        feature_weights=fitted.weights(finite[number]).astype(np.float32),
        codes=fitted.codes.astype(np.float32),
    )


def _as_contexts(effects: Effects, rows: I64) -> Contexts:
    """Return the effects of sets in contexts, NaN where a context lacks a set."""
    values = np.full((len(effects.pool.logs), len(rows), effects.general.shape[1]), np.nan, np.float32)
    column = {int(row): at for at, row in enumerate(rows)}
    for (context, row), own in zip(effects.own_of.tolist(), effects.own, strict=True):
        if row in column:
            values[context, column[row]] = effects.general[row] + own
    keys: list[Key] = [(effects.sets[row], None) for row in rows]
    return Contexts(effects.pool.logs.astype(np.float64), values, keys)


def _shapes(found: Estimates, sets: list[tuple[str, ...]]) -> dict[tuple[str, ...], F64]:
    """Return the effect ``[G]`` of all cells of a single perturbation, for those at several doses.

    Doses share their control cells, whose noise averaging does not lower.
    """
    shapes: dict[tuple[str, ...], F64] = {}
    for names in dict.fromkeys(sets):
        rows = [row for row, other in enumerate(sets) if other == names]
        at = np.flatnonzero(np.isin(found.row, rows))
        if len(names) > 1 or len(rows) < 2 or not len(at):
            continue
        weight = found.cells[at] / found.cells[at].sum()
        variance = weight**2 @ found.of_perturbed[at].astype(np.float64)
        for context in np.unique(found.context[at]):
            here = found.context[at] == context
            variance += weight[here].sum() ** 2 * found.of_control[at[here][0]]
        shapes[names] = shrink(weight @ found.effect[at].astype(np.float64), np.sqrt(variance))
    return shapes


def _along(shape: F64, estimate: F64, error: F64) -> F64:
    """Return the part of an estimate ``[G]`` along a shape: ``a shape``, a shrunk by its own error."""
    information = float((shape**2 / error**2).sum())
    if information == 0:
        return np.zeros_like(shape)
    a = float((shape * estimate / error**2).sum()) / information
    return max(0.0, 1 - 1 / max(information * a**2, 1e-12)) * a * shape


def _sum(sets: list[tuple[str, ...]], doses: F64, general: F64, row: int) -> F64:
    """Return the sum of the effects of a combination's members at its dose ``[G]``; 0 for those that were not
    measured.
    """
    total = np.zeros(general.shape[1])
    for name in sets[row]:
        for at, other in enumerate(sets):
            if other == (name,) and (doses[at] == doses[row] or (np.isnan(doses[at]) and np.isnan(doses[row]))):
                total += general[at]
    return total


def _pair_factor(pairs: Sequence[tuple[F64, tuple[F64, F64] | None]]) -> float:
    """Return the multiple of sums that comes closest to the effects of pairs; 1 where they cannot tell."""
    products = np.array([expected @ found[0] for expected, found in pairs if found is not None])
    squares = np.array([expected @ expected for expected, found in pairs if found is not None])
    return _factor(products, squares)


def _factor(products: F64, squares: F64) -> float:
    """Return the ratio of sums, shrunk towards 1 by its error between terms."""
    n, size = len(products), float(squares.sum())
    if n < LEAST_LABELS or size == 0:
        return 1.0
    ratio = float(products.sum()) / size
    off = products - ratio * squares
    error = float(np.sqrt(n / (n - 1) * (off**2).sum())) / size
    away = ratio - 1
    return float(np.clip(1 + away * max(0.0, 1 - error**2 / max(away**2, 1e-12)), *LIMITS))


def _knock_down(moments: GroupMoments, sets: list[tuple[str, ...]], members: Known) -> float | None:
    """Return the natural log of the fold by which perturbations change their own targets, weighted by molecules."""
    before, after = 0.0, 0.0
    control = {int(moments.context[at]): at for at in np.flatnonzero(moments.label == CONTROL)}
    for at, label in enumerate(moments.label):
        if label == CONTROL or len(sets[label]) > 1 or int(moments.context[at]) not in control:
            continue
        target = members.targets.get(sets[label][0], -1)
        if target >= 0:
            n = float(moments.cells[at])
            before += n * float(moments.mean[control[int(moments.context[at])], target])
            after += n * float(moments.mean[at, target])
    return float(np.log((after + 1e-3 * before) / (before + 1e-3 * before))) if before > 0 else None


def _ratio(kept: F64, of: F64) -> F64:
    found: F64 = np.divide(kept, of, out=np.zeros_like(kept), where=np.abs(of) > 1e-12)
    return found
