"""The protocol ``time-point-v2``: whether a generated time point is nearer to the real one than baselines without
learning.

Frozen: a change of any figure needs a new protocol id. The cells of one time point were kept from the model. They are
compared with generated ones and with baselines that see the same neighbouring time points:

    previous, next    their cells as they are
    OT-midpoint       displacement interpolation of both in the embedding, at the missing point's share s of the gap
      as counts       the same pairs, each as one cell that keeps 1 - s of the one's counts and s of the other's
    trend             where nothing comes after: the previous cells, moved on by the mean's last step

For each of several seeds the real cells are halved at random. Every row is compared with n cells of the one half, and
the ceiling is n cells of the other: n is the same for all, since every figure here depends on it. n = min(half of the
real cells, cells of the smallest row, 1,000).

The verdict on a figure is against its strongest baseline, by the rules and the errors of
:mod:`bgen.evaluate.protocols.verdicts`: all rows of a seed see the same real cells, which are halved again and again.
``time-point-v1`` had the same figures; its verdicts got looser with noise.

Interpolated cells have less scatter than measured ones. W1 and W2 of few cells in many dimensions reward that: there
the OT-midpoint may come out below the ceiling. Energy distance and MMD do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text
from scipy import sparse

from bgen.arrays import F64
from bgen.errors import UserError
from bgen.evaluate.metrics import distribution
from bgen.evaluate.metrics.metric import Metric
from bgen.evaluate.metrics.registry import choose_metrics
from bgen.evaluate.protocols.scores import SHORT, STYLES, Estimate, Score
from bgen.evaluate.protocols.verdicts import errors_of, half_gaps
from bgen.flow.displacement import displace, draw, transport_plan
from bgen.notebooks import as_html

PROTOCOL = "time-point-v2"
MAX_CELLS = 1000
MIN_CELLS = 10
PLAN_CELLS = 2000
"""Cells of each neighbour that the transport plan is found for, at most."""

TOLD = ("margin", "errors", "equivalent", "baseline_equivalent", "verdict")
"""What a file holds of a verdict."""

METRICS: tuple[Metric[distribution.Populations], ...] = choose_metrics("w1", "w2", "energy", "mmd2")


@dataclass(frozen=True)
class Pool:
    """Cells that a row draws from: coordinates ``[K, D]``, and weights ``[K]`` where they are not all alike."""

    points: NDArray[Any]
    weights: F64 | None = None

    def draw(self, n: int, rng: np.random.Generator) -> NDArray[Any]:
        """Draw n cells, each at most once where all are alike."""
        if self.weights is None:
            return self.points[rng.choice(len(self.points), n, replace=False)]
        return self.points[draw(self.weights, n, rng)]


def interpolation_baselines(previous: NDArray[Any], following: NDArray[Any], share: float) -> dict[str, Pool]:
    """Return the baselines for a point at ``share`` of the way between two populations, ``[N, D]`` and ``[M, D]``."""
    rng = np.random.default_rng(0)
    some = [side[rng.permutation(len(side))[:PLAN_CELLS]] for side in (previous, following)]
    return {
        "previous": Pool(previous),
        "next": Pool(following),
        "OT-midpoint": Pool(*displace(some[0], some[1], share)),
    }


def mixed_counts(
    previous: sparse.csr_matrix,
    following: sparse.csr_matrix,
    previous_at: NDArray[Any],
    following_at: NDArray[Any],
    share: float,
) -> sparse.csr_matrix:
    """Return the OT-midpoint as counts ``[n, G]``, n cells as in the larger population.

    Partners i, j are those of the plan in the embedding, at ``[N, D]`` and ``[M, D]``; their cell is
    Binomial(x_i, 1 - share) + Binomial(x_j, share), so that it is as noisy as measured cells are.
    """
    rng = np.random.default_rng(0)
    some = [rng.permutation(side.shape[0])[:PLAN_CELLS] for side in (previous, following)]
    i, j, weights = transport_plan(previous_at[some[0]], following_at[some[1]])
    chosen = draw(weights, max(len(some[0]), len(some[1])), rng)
    parts = []
    for counts, keep in ((previous[some[0][i[chosen]]], 1 - share), (following[some[1][j[chosen]]], share)):
        kept = rng.binomial(np.rint(counts.data).astype(np.int64), keep).astype(np.float32)
        parts.append(sparse.csr_matrix((kept, counts.indices, counts.indptr), shape=counts.shape))
    mixed = sparse.csr_matrix(parts[0] + parts[1])
    mixed.eliminate_zeros()
    return mixed


def forecast_baselines(previous: NDArray[Any], before: NDArray[Any] | None, ratio: float) -> dict[str, Pool]:
    """Return the baselines for a point after the last population ``[N, D]``.

    ``before`` is the population before that, if there is one, and ``ratio`` the gap to the point over their gap.
    """
    pools = {"previous": Pool(previous)}
    if before is not None:
        pools["trend"] = Pool(previous + ratio * (previous.mean(0) - before.mean(0)))
    return pools


@dataclass(frozen=True)
class TimeScores:
    """Figures of one time point: metric key to row to estimate. Rows: model, the baselines, ceiling.

    Attributes
    ----------
    gaps
        What errors are made of (:func:`bgen.evaluate.protocols.verdicts.half_gaps`): metric key to row to the gaps of
        all splits.
    """

    cells: int
    subsamples: int
    setting: dict[str, int | float | str]
    figures: dict[str, dict[str, Estimate]]
    gaps: dict[str, dict[str, F64]]
    protocol: str = PROTOCOL
    metrics: tuple[Metric[Any], ...] = METRICS

    def strongest(self, key: str) -> str:
        """Return the baseline with the lowest mean."""
        rows = {row: e.mean for row, e in self.figures[key].items() if row not in ("model", "ceiling")}
        return min(rows, key=lambda row: rows[row])

    def score(self, metric: Metric[Any]) -> Score:
        """Return a figure of the model beside its strongest baseline and the ceiling."""
        rows = ("model", self.strongest(metric.key), "ceiling")
        model, baseline, ceiling = (self.figures[metric.key][row] for row in rows)
        gaps = np.stack([self.gaps[metric.key][row] for row in rows], axis=-1)
        return Score(metric, model, baseline, ceiling, errors_of(gaps))

    def verdict(self, key: str) -> str:
        """Judge the model by one figure, against the strongest baseline."""
        return self.score(next(metric for metric in self.metrics if metric.key == key)).verdict

    def headline(self) -> str:
        """Return one sentence in plain words."""
        parts = [f"{m.title}: {self.verdict(m.key)} ({self.strongest(m.key)})" for m in self.metrics]
        return "The generated time point, by " + "; by ".join(parts) + "."

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "protocol": self.protocol,
            "headline": self.headline(),
            "cells": self.cells,
            "subsamples": self.subsamples,
            "setting": dict(self.setting),
            "metrics": {
                m.key: {
                    "title": m.title,
                    "better": m.better,
                    "rows": {row: {"mean": e.mean, "sd": e.sd} for row, e in self.figures[m.key].items()},
                    "strongest_baseline": self.strongest(m.key),
                    **{name: told[name] for name in TOLD},
                }
                for m, told in ((m, self.score(m).as_json()) for m in self.metrics)
            },
        }

    def _repr_html_(self) -> str:
        return as_html(self.headline(), self.table())

    def table(self) -> Table:
        """Return a table that fits a terminal of 80 columns."""
        caption = (
            f"{self.cells:,} cells on each side, mean±sd of {self.subsamples} subsamples; lower is better. ceiling: "
            "real against real. Verdict against the strongest baseline."
        )
        table = Table(
            title=f"Scores ({self.protocol})", caption=caption, box=None, collapse_padding=True, pad_edge=False
        )
        table.add_column("", no_wrap=True)
        for metric in self.metrics:
            table.add_column(metric.title, justify="right", no_wrap=True)
        for row in self.figures[self.metrics[0].key]:
            cells = [
                f"{self.figures[m.key][row].mean:z.{m.digits}f}±{self.figures[m.key][row].sd:.{m.digits}f}"
                for m in self.metrics
            ]
            table.add_row(row, *cells)
        verdicts = [self.verdict(m.key) for m in self.metrics]
        table.add_row("verdict", *(Text(SHORT[verdict], style=STYLES[verdict]) for verdict in verdicts))
        return table


def measure(real: NDArray[Any], other: NDArray[Any], bandwidth: float) -> dict[str, float]:
    """Return every figure of ``other [n, D]`` against ``real [n, D]``, by key."""
    evidence = distribution.Populations(real, other, bandwidth)
    return {metric.key: metric.compute(evidence) for metric in METRICS}


def evaluate_time_point(
    real: NDArray[Any],
    generated: NDArray[Any],
    baselines: Mapping[str, Pool],
    *,
    seeds: int = 3,
    max_cells: int = MAX_CELLS,
    setting: Mapping[str, int | float | str] | None = None,
) -> TimeScores:
    """Score a generated population between baselines and ceiling.

    Parameters
    ----------
    real, generated
        Coordinates ``[N, D]`` and ``[M, D]`` in an embedding that was not fitted on these real cells.
    baselines
        From :func:`interpolation_baselines` or :func:`forecast_baselines`, in the same embedding.
    seeds
        Subsamples, at least 2.
    setting
        What else fixes the figures, for the record.

    Raises
    ------
    UserError
        If there are too few cells.
    """
    if seeds < 2:
        raise UserError(f"seeds must be at least 2, not {seeds}: verdicts need the spread over subsamples")
    rows = {"model": Pool(generated), **baselines}
    n = min(len(real) // 2, max_cells, *(len(pool.points) for pool in rows.values()))
    if n < MIN_CELLS:
        sizes = ", ".join(f"{name} {len(pool.points)}" for name, pool in rows.items())
        raise UserError(
            f"A time point is scored with {MIN_CELLS} cells at least on each side; there are {len(real)} real cells, "
            f"of which half serve as ceiling, and in the other rows: {sizes}."
        )
    context = np.concatenate([pool.points[:MAX_CELLS] for pool in baselines.values()])
    bandwidth = distribution.median_bandwidth(context[np.random.default_rng(0).permutation(len(context))[:MAX_CELLS]])
    measured: dict[str, list[dict[str, float]]] = {}
    gaps: list[F64] = []
    for seed in range(seeds):
        rng = np.random.default_rng([seed, 2])
        halves = real[rng.permutation(len(real))[: 2 * n]]
        drawn = {row: pool.draw(n, rng) for row, pool in rows.items()} | {"ceiling": halves[n:]}
        for row, other in drawn.items():
            measured.setdefault(row, []).append(measure(halves[:n], other, bandwidth))
        evidence = {row: distribution.Populations(halves[:n], other, bandwidth) for row, other in drawn.items()}
        gaps.append(half_gaps(evidence, METRICS, np.random.default_rng([seed, 3]), n))
    return TimeScores(
        n,
        seeds,
        dict(setting or {}),
        {m.key: {row: Estimate(tuple(run[m.key] for run in runs)) for row, runs in measured.items()} for m in METRICS},
        {
            m.key: dict(zip(measured, np.moveaxis(np.concatenate(gaps)[:, :, at], 1, 0), strict=True))
            for at, m in enumerate(METRICS)
        },
    )
