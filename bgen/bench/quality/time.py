"""``bgen bench time``: leave each inner time point of a course out, generate it, and compare.

Rows: the flow; previous and next time point; OT-midpoint of both; OT-CFM, trained here (latent courses only); one half
of the real cells against the other. With forecast (courses of counts) the point is generated from those before it, and
the trend of the mean stands instead of next and midpoint. Everything that learns is trained anew for each point and
seed, on the other time points alone. On latent courses W1 is exact, between all real cells and all cells of a row (for
the OT-midpoint, its whole weighted plan), as in published tables; the other figures are between equally many cells.
Courses of counts are scored by the protocol ``time-point-v2``, in principal components of the time points that were not
left out.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ot
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from rich.table import Table
from scipy.spatial.distance import cdist

from bgen.arrays import F64
from bgen.bench.quality.ot_cfm import STEPS, ot_cfm
from bgen.bench.quality.time_counts import read_simulated, read_worm, score_missing_time
from bgen.bench.quality.time_latents import Course, Recipe, generate, recipe, train
from bgen.errors import UserError, nearest
from bgen.evaluate.metrics.distribution import Populations, median_bandwidth
from bgen.evaluate.metrics.registry import choose_metrics
from bgen.evaluate.protocols.scores import Estimate, Score
from bgen.evaluate.protocols.time_point import METRICS, Pool, interpolation_baselines, measure
from bgen.evaluate.protocols.verdicts import errors_of, half_gaps
from bgen.files import require_new_folder
from bgen.progress import Say

MODEL, REAL = "bgen flow", "real halves"
Figures = dict[str, dict[str, float]]
"""Row to metric key to figure."""
Gaps = dict[str, dict[str, F64]]
"""Metric key to row to gaps."""


def read_emt(path: Path) -> Course:
    """Read the EMT course (Sha et al., Nature Machine Intelligence 2024): column ``samples``, then 10 dimensions."""
    table = pd.read_csv(path)
    if "samples" not in table:
        raise UserError(f"{path} has no column 'samples'.{nearest('samples', table.columns)}")
    cells = table.drop(columns="samples").to_numpy(np.float32)
    return Course(cells, table["samples"].to_numpy(np.float64))


def read_eb(path: Path) -> Course:
    """Read the embryoid-body course (Moon et al., Nature Biotechnology 2019): whitened, first 5 components."""
    data = np.load(path)
    if not {"pcs", "sample_labels"} <= set(data.files):
        raise UserError(f"{path} holds {', '.join(data.files)}; 'pcs' and 'sample_labels' are needed.")
    components = data["pcs"].astype(np.float64)
    whitened = (components - components.mean(0)) / components.std(0)
    return Course(whitened[:, :5].astype(np.float32), data["sample_labels"].astype(np.float64))


LATENT = {"emt": read_emt, "eb": read_eb}
COUNTS = {"worm": read_worm, "simulated": read_simulated}
NAMES = [*LATENT, *COUNTS]


@dataclass(frozen=True)
class Comparison:
    """Figures of every left-out time point and seed: ``runs[point][seed]``.

    ``gaps[point][seed]`` is what errors are made of (:func:`bgen.evaluate.protocols.verdicts.half_gaps`): metric key to
    row to the gaps of all splits.
    """

    data: str
    runs: dict[float, list[Figures]]
    gaps: dict[float, list[Gaps]]

    def rows(self) -> list[str]:
        """Names of the rows."""
        return list(next(iter(self.runs.values()))[0])

    def estimate(self, row: str, key: str, point: float | None = None) -> Estimate:
        """Return a figure over seeds, at one point or as the mean over all of them."""
        points = list(self.runs) if point is None else [point]
        seeds = range(len(self.runs[points[0]]))
        return Estimate(tuple(float(np.mean([self.runs[p][s][row][key] for p in points])) for s in seeds))

    def verdicts(self, key: str) -> dict[str, str]:
        """Judge the flow against each other row by the mean over points: what such trainings make, on these cells."""
        (metric,) = choose_metrics(key)
        told = {}
        for row in self.rows():
            if row not in (MODEL, REAL):
                three = [self.estimate(name, key) for name in (MODEL, row, REAL)]
                gaps = [self._gaps(name, key) for name in (MODEL, row, REAL)]
                trainings = np.array([one.shortfall(metric.better).values for one in three]).T
                errors = errors_of(np.stack(gaps, axis=-1), trainings)
                told[row] = Score(metric, three[0], three[1], three[2], errors).verdict
        return told

    def _gaps(self, row: str, key: str) -> F64:
        """Return the gaps of the mean over points, of all splits and seeds."""
        of_points = [np.concatenate([seed[key][row] for seed in seeds]) for seeds in self.gaps.values()]
        return np.mean(of_points, axis=0)

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "data": self.data,
            "points": {f"{point:g}": runs for point, runs in self.runs.items()},
            "means": {
                row: {m.key: {"mean": (e := self.estimate(row, m.key)).mean, "sd": e.sd} for m in METRICS}
                for row in self.rows()
            },
            "verdicts": {m.key: self.verdicts(m.key) for m in METRICS},
        }

    def table(self) -> Table:
        """Return W1 of each point, and the mean of every figure."""
        seeds = len(next(iter(self.runs.values())))
        halves = (
            f" '{REAL}' has half as many cells on each side, which makes it too high." if self.data in LATENT else ""
        )
        table = Table(
            title=f"Left-out time points of {self.data}",
            caption=f"Means over points, ±sd over {seeds} seeds; lower is better. Verdict by mean W1.{halves}",
            box=None,
            pad_edge=False,
        )
        table.add_column("")
        for point in self.runs:
            table.add_column(f"W1 t={point:g}", justify="right")
        for metric in METRICS:
            table.add_column(metric.key, justify="right")
        table.add_column("flow is")
        verdicts = self.verdicts("w1")
        for row in self.rows():
            cells = [f"{self.estimate(row, 'w1', point).mean:.3f}" for point in self.runs]
            cells += [_shown(self.estimate(row, metric.key)) for metric in METRICS]
            table.add_row(row, *cells, verdicts.get(row, "").removesuffix(" than the baseline"))
        return table


def bench_time(
    data: str,
    path: Path,
    out: Path,
    *,
    seeds: int,
    points: list[float] | None,
    steps: int | None,
    say: Say,
    forecast: bool = False,
    both: bool = False,
    solver_steps: int = 4,
    mixer: str | None = None,
) -> Comparison:
    """Compare on one course and write ``time.json``.

    ``both``: what is trained learns to interpolate and to forecast, as ``bgen finetune --task time`` does, and as
    ``forecast`` implies; otherwise to interpolate. ``mixer``: see :func:`bgen.bench.quality.time_latents.recipe`.

    Raises
    ------
    UserError
        If there is no such course, file or time point, or a course of latents is to be forecast.
    """
    if data not in NAMES:
        raise UserError(f"There is no benchmark '{data}'.{nearest(data, NAMES)}")
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    if seeds < 2:
        raise UserError(f"--seeds must be at least 2, not {seeds}: verdicts need the spread.")
    if forecast and data in LATENT:
        raise UserError(f"--forecast is for courses of counts ({', '.join(COUNTS)}), not for {data}.")
    recipe(mixer=mixer)  # its name is known before anything is made
    require_new_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    if data in LATENT:
        settings = recipe(steps=steps, forecast=both, solver_steps=solver_steps, mixer=mixer)
        runs, gaps = _latent(data, path, out, seeds, points, settings, steps or STEPS, say)
    else:
        cells, system = COUNTS[data](path)
        gap = float(np.median(np.diff(np.unique(cells.obs["time"]))))
        forecasts = forecast or both
        settings = recipe(steps=steps, scale=gap, forecast=forecasts, solver_steps=solver_steps, mixer=mixer)
        runs, gaps = _counts(data, (cells, system), out, seeds, points, settings, forecast, say)
    compared = Comparison(data, runs, gaps)
    (out / "time.json").write_text(json.dumps(compared.as_json(), indent=1) + "\n", encoding="utf-8")
    return compared


def _latent(
    data: str,
    path: Path,
    out: Path,
    seeds: int,
    points: list[float] | None,
    settings: Recipe,
    peer_steps: int,
    say: Say,
) -> tuple[dict[float, list[Figures]], dict[float, list[Gaps]]]:
    course = LATENT[data](path)
    runs: dict[float, list[Figures]] = {}
    gaps: dict[float, list[Gaps]] = {}
    for point in _inner(course.times, points):
        rest, real = course.without(point), course.at(point)
        before, after = max(t for t in rest.times if t < point), min(t for t in rest.times if t > point)
        known = interpolation_baselines(rest.at(before), rest.at(after), (point - before) / (after - before))
        bandwidth = median_bandwidth(rest.cells[np.random.default_rng(0).permutation(len(rest.cells))[:1000]])
        populations = {time: rest.at(time) for time in rest.times}
        for seed in range(seeds):
            rng = np.random.default_rng([seed, 4])
            folder = out / f"time{point:g}-seed{seed}"
            flow = train(rest, settings, seed, folder)
            shutil.rmtree(folder)
            pools = {MODEL: Pool(generate(flow, rest, point, len(real), settings, seed)), **known}
            pools["OT-CFM"] = Pool(ot_cfm(populations, point, len(real), seed, peer_steps))
            found = {row: _figures(real, pool, bandwidth, rng) for row, pool in pools.items()}
            halves = rng.permutation(real)[: len(real) // 2 * 2].reshape(2, -1, real.shape[1])
            found[REAL] = measure(halves[0], halves[1], bandwidth)
            runs.setdefault(point, []).append(found)
            gaps.setdefault(point, []).append(_gaps_of(real, pools, halves, bandwidth, seed))
            say(_line(data, point, seed, found))
    return runs, gaps


def _counts(
    data: str,
    course: tuple[AnnData, list[str]],
    out: Path,
    seeds: int,
    points: list[float] | None,
    settings: Recipe,
    forecast: bool,
    say: Say,
) -> tuple[dict[float, list[Figures]], dict[float, list[Gaps]]]:
    cells, system = course
    runs: dict[float, list[Figures]] = {}
    gaps: dict[float, list[Gaps]] = {}
    for point in _inner(sorted(cells.obs["time"].unique().tolist()), points):
        for seed in range(seeds):
            folder = out / f"time{point:g}-seed{seed}"
            scores = score_missing_time(cells, point, folder, settings, system=system, seed=seed, forecast=forecast)
            shutil.rmtree(folder)
            rows = {"model": MODEL, "ceiling": REAL}
            found = {
                rows.get(row, row): {m.key: scores.figures[m.key][row].mean for m in METRICS}
                for row in scores.figures["w1"]
            }
            runs.setdefault(point, []).append(found)
            own = {key: {rows.get(row, row): gap for row, gap in of.items()} for key, of in scores.gaps.items()}
            gaps.setdefault(point, []).append(own)
            say(_line(data, point, seed, found))
    return runs, gaps


def _inner(times: list[float], points: list[float] | None) -> list[float]:
    inner = times[1:-1]
    for point in points or []:
        if point not in inner:
            choices = ", ".join(f"{time:g}" for time in inner)
            raise UserError(f"--point {point:g} is no inner time point; those are: {choices}.")
    return points or inner


def _figures(real: NDArray[Any], pool: Pool, bandwidth: float, rng: np.random.Generator) -> dict[str, float]:
    """Return the figures of a row: W1 with all its cells, the others with as many as there are real ones."""
    weights = _weights(pool)
    as_many = Pool(pool.points, weights).draw(len(real), rng)
    uniform = np.full(len(real), 1 / len(real))
    w1 = float(ot.emd2(weights, uniform, cdist(pool.points, real), numItermax=10_000_000))
    return {**measure(real, as_many, bandwidth), "w1": w1}


def _gaps_of(real: NDArray[Any], pools: dict[str, Pool], halves: NDArray[Any], bandwidth: float, seed: int) -> Gaps:
    """Return the gaps of every row, those of :data:`REAL` for half as many cells."""
    rng = np.random.default_rng([seed, 5])
    others = {row: Pool(pool.points, _weights(pool)).draw(len(real), rng) for row, pool in pools.items()}
    evidence = {row: Populations(real, other, bandwidth) for row, other in others.items()}
    found = half_gaps(evidence, METRICS, rng, len(real))
    of_real = half_gaps({REAL: Populations(halves[0], halves[1], bandwidth)}, METRICS, rng, len(halves[0]))
    whole = np.concatenate([found, of_real], axis=1)
    return {m.key: dict(zip([*evidence, REAL], whole[:, :, at].T, strict=True)) for at, m in enumerate(METRICS)}


def _weights(pool: Pool) -> NDArray[np.float64]:
    return np.full(len(pool.points), 1 / len(pool.points)) if pool.weights is None else pool.weights


def _line(data: str, point: float, seed: int, found: Figures) -> str:
    shown = ", ".join(f"{row} {figures['w1']:.4f}" for row, figures in found.items())
    return f"{data} t={point:g} seed {seed}: W1 {shown}"


def _shown(estimate: Estimate) -> str:
    return f"{estimate.mean:z.4f}±{estimate.sd:.4f}"
