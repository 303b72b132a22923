"""Where the cells of a missing time point start, planned over the whole populations around it.

As training did with ``flow.coupling.cells`` (:mod:`bgen.flow.plans`), but over the user's cells: between two observed
time points their displacement interpolation, beside one its own cells; with the growth that was learned, the more often
the more they grow.

Axes: n cells to generate, N and M observed cells, D latent size.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from bgen.arrays import I64
from bgen.flow.displacement import displaced_pairs, draw
from bgen.flow.growth import growth
from bgen.models.generators.conditions import Condition
from bgen.models.generators.latent_flow import LatentFlow


def plans_whole(flow: LatentFlow) -> bool:
    """Whether a flow starts from plans over whole populations."""
    return flow.config.source == "neighbours" and flow.config.coupling.cells > 0


def some_of(flow: LatentFlow, rows: I64, rng: np.random.Generator) -> I64:
    """Return the cells of a population that stand for it: all, or a random choice of as many as training had."""
    most = flow.config.coupling.cells
    return rows if len(rows) <= most else np.sort(rng.choice(rows, most, replace=False))


def starts_between(
    flow: LatentFlow, before: Tensor, after: Tensor, share: float, n: int, rng: np.random.Generator
) -> Tensor:
    """Return ``n`` starts ``[n, D]``, a ``share`` of the way from ``before [N, D]`` to ``after [M, D]``."""
    coupling = flow.config.coupling
    x, y = before.numpy(), after.numpy()
    i, j, weights = displaced_pairs(x, y, share, growth(x, y, coupling.penalty) if coupling.growth else None)
    chosen = rng.permutation(draw(weights, n, rng))
    return torch.lerp(before[torch.from_numpy(i[chosen])], after[torch.from_numpy(j[chosen])], share)


def starts_beside(
    flow: LatentFlow,
    cells: Tensor,
    conditions: Mapping[str, Condition],
    gap: float,
    n: int,
    rng: np.random.Generator,
) -> Tensor:
    """Return ``n`` starts ``[n, D]`` among the observed ``cells [N, D]``, for a time that is a ``gap`` later.

    ``conditions`` are those of the observed population, ``[1]`` each.
    """
    grown = flow.grown(cells, conditions, gap)
    weights = np.full(len(cells), 1 / len(cells)) if grown is None else grown.cpu().double().numpy()
    return cells[torch.from_numpy(rng.permutation(draw(weights, n, rng)))]
