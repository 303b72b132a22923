"""A predicted time point beside the cells that the data hold of it, and beside baselines from the same neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.evaluate.metrics.space import fit_space
from bgen.evaluate.protocols.time_point import (
    Pool,
    TimeScores,
    forecast_baselines,
    interpolation_baselines,
    mixed_counts,
)
from bgen.evaluate.registry import TimePointProtocol, find_protocol
from bgen.tasks.time.axis import TimeAxis
from bgen.tasks.time.observed import Observed, Task


def score_time(
    observed: Observed,
    seen: NDArray[np.bool_],
    tasks: Sequence[Task],
    truth: sp.csr_matrix,
    made: sp.csr_matrix,
    axis: TimeAxis,
    forecast: bool,
) -> TimeScores:
    """Compare with the truth, in principal components of the cells ``seen`` (a bool per cell): those not asked for."""
    space = fit_space(observed.counts[seen])
    found: dict[str, list[tuple[Pool, int]]] = {}
    for task in tasks:
        sides = task.side(False), task.side(True)
        previous = space.project(observed.counts[task.context[sides[0][-1]]])
        if forecast:
            before = space.project(observed.counts[task.context[sides[0][-2]]]) if len(sides[0]) > 1 else None
            gap = sides[0][-1] - sides[0][-2] if len(sides[0]) > 1 else 1.0
            pools = forecast_baselines(previous, before, (task.time - sides[0][-1]) / gap)
        else:
            ends = [observed.counts[task.context[time]] for time in (sides[0][-1], sides[1][0])]
            following = space.project(ends[1])
            pools = interpolation_baselines(previous, following, task.share)
            mixed = mixed_counts(ends[0], ends[1], previous, following, task.share)
            pools["OT-midpoint as counts"] = Pool(space.project(mixed))
        for name, pool in pools.items():
            found.setdefault(name, []).append((pool, task.n))
    baselines = {name: _together(pools) for name, pools in found.items() if len(pools) == len(tasks)}
    setting: dict[str, int | float | str] = {
        "time": tasks[0].time,
        "systems": len(tasks),
        "genes": int(truth.shape[1]),
        "components": len(space.components),
        "time_was_in_training": str(bool(np.isclose(axis.trained, tasks[0].time).any())),
    }
    return find_protocol(TimePointProtocol).evaluate(
        space.project(truth), space.project(made), baselines, setting=setting
    )


def _together(pools: Sequence[tuple[Pool, int]]) -> Pool:
    """Join the pools of several systems, each with the weight of its cells."""
    if len(pools) == 1:
        return pools[0][0]
    weights = []
    for pool, n in pools:
        own = np.full(len(pool.points), 1.0) if pool.weights is None else pool.weights
        weights.append(own / own.sum() * n)
    return Pool(np.concatenate([pool.points for pool, _ in pools]), np.concatenate(weights))
