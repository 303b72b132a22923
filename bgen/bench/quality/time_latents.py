"""A hybrid flow on a time course of measured latents: train without one time point, then generate that one.

Axes: B trajectories, T time points, N cells per time point, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from bgen.arrays import F32
from bgen.bench.runs import fit_whole
from bgen.config.backbone import TIME_MIXERS, BackboneConfig
from bgen.config.data import TrajectoriesConfig
from bgen.config.flow import FlowConfig, SampleConfig
from bgen.config.run import RunConfig
from bgen.config.track import TrackConfig
from bgen.config.train import TrainConfig
from bgen.data.cells_in_memory import MemoryCells
from bgen.errors import UserError, nearest
from bgen.models.backbones.size import backbone_parameters, with_parameters
from bgen.models.generators.latent_flow import LatentFlow, Places
from bgen.models.measured_latents import MeasuredLatents
from bgen.order.keys import hash_keys
from bgen.tasks.finetune.course import course_flow
from bgen.tasks.time.starts import plans_whole, some_of, starts_between
from bgen.train.stages.course_in_memory import CourseStage
from bgen.train.trainer import check

NO_MIXER = "none"
_SIZE = 17
"""Size of the latents at which networks have about as many parameters."""


@dataclass(frozen=True)
class Course:
    """Cells ``[n, D]`` with their times ``[n]``."""

    cells: F32
    time: NDArray[np.float64]

    @property
    def times(self) -> list[float]:
        """Distinct times, ascending."""
        return np.unique(self.time).tolist()

    def at(self, time: float) -> F32:
        """Return the cells of one time point."""
        return self.cells[self.time == time]

    def without(self, time: float) -> Course:
        """Return the course without one time point."""
        return Course(self.cells[self.time != time], self.time[self.time != time])


@dataclass(frozen=True)
class Recipe:
    """How a benchmark's flow is trained: settings of the flow, of its trajectories and of the training loop."""

    flow: FlowConfig
    sample: SampleConfig
    shape: TrajectoriesConfig
    train: TrainConfig


def recipe(
    *,
    steps: int | None = None,
    scale: float = 1.0,
    cells: int = 128,
    forecast: bool = False,
    solver_steps: int = 4,
    mixer: str | None = None,
) -> Recipe:
    """Return the one recipe of all courses.

    Parameters
    ----------
    scale
        A typical gap in time.
    forecast
        A third of the training is for forecasts.
    mixer
        Another mixer over time than the recipe's, or "none", with about as many parameters.

    Raises
    ------
    UserError
        If there is no such mixer.
    """
    shape = TrajectoriesConfig(times=3, cells=cells)
    flow = course_flow(scale, forecast=forecast)
    if mixer is not None:
        flow = flow.model_copy(update={"backbone": _with_mixer(flow.backbone, mixer)})
    return Recipe(
        flow,
        SampleConfig(steps=solver_steps),
        shape,
        TrainConfig(
            steps=steps or 300,
            global_batch=4 * shape.size,
            learning_rate=2e-3,
            warmup=50,
            ema=0.99,
            eval_every=0,
        ),
    )


def _with_mixer(backbone: BackboneConfig, mixer: str) -> BackboneConfig:
    if mixer not in (*TIME_MIXERS, NO_MIXER):
        raise UserError(f"There is no mixer over time '{mixer}'.{nearest(mixer, [*TIME_MIXERS, NO_MIXER])}")
    settings = backbone.model_dump()
    if mixer == NO_MIXER:
        settings["pattern"] = [axis for axis in backbone.axes if axis != "time"]
    else:
        settings["time"]["mixer"] = mixer
        settings["mamba2"]["head_width"] = 4  # divides every width that is tried
    return with_parameters(_SIZE, settings, backbone_parameters(_SIZE, backbone), 4)


def train(course: Course, recipe: Recipe, seed: int, folder: Path) -> LatentFlow:
    """Train on trajectories of a whole course in a new run ``folder``; returns the moving average of the weights."""
    quiet = TrackConfig(mlflow=False, progress=False, system=False)
    config = RunConfig(stage="flow", out=folder, seed=seed, train=recipe.train, track=quiet)
    world = check(config)
    torch.manual_seed(seed)
    centre, spread = course.cells.mean(0), course.cells.std()
    table = torch.from_numpy((course.cells - centre) / spread)
    vae = MeasuredLatents(table)
    vae.latent_mean.copy_(torch.from_numpy(centre))
    vae.latent_std.fill_(float(spread))
    n = len(course.cells)
    cells, everyone = MemoryCells(sparse.csr_matrix(np.zeros((n, 1), np.float32)), {}), np.arange(n)
    stage = CourseStage(
        config,
        LatentFlow(recipe.flow, vae, {}, {}),
        cells,
        recipe.shape,
        np.zeros(n, np.int64),
        course.time,
        everyone,
        everyone,  # without evaluations nobody is watched
        world,
        {},
    )
    fit_whole(config, stage)
    assert isinstance(stage.module, LatentFlow)
    return stage.module


def generate(flow: LatentFlow, course: Course, time: float, n: int, recipe: Recipe, seed: int) -> F32:
    """Generate n cells at a missing time from the observed ones around it, by interpolation: ``[n, D]``."""
    there = course.times
    chosen = sorted(sorted(there, key=lambda other: abs(other - time))[: recipe.shape.times - 1])
    if not chosen[0] < time < chosen[-1]:
        before, after = [t for t in there if t < time], [t for t in there if t > time]
        chosen = [before[-1], after[0]]
    rng = np.random.default_rng([seed, 3])
    assert isinstance(flow.vae, MeasuredLatents)
    table = flow.vae.table
    N, B = recipe.shape.cells, -(-n // recipe.shape.cells)
    times = sorted([*chosen, time])
    missing = times.index(time)
    z = torch.zeros(B, len(times), N, course.cells.shape[1])
    mask = torch.zeros(B, len(times), N, dtype=torch.bool)
    mask[:, missing] = True
    for t, moment in enumerate(times):
        if t != missing:
            rows = np.flatnonzero(course.time == moment)
            some = min(N, len(rows))
            rounds = -(-B * some // len(rows))
            dealt = np.concatenate([rng.permutation(rows) for _ in range(rounds)])[: B * some].reshape(B, some)
            mask[:, t, :some] = True
            z[:, t, :some] = table[torch.from_numpy(dealt)]
    time_BT = torch.tensor(times).float().expand(B, -1)
    seen = (torch.arange(len(times)) != missing).expand(B, -1)
    keys = torch.from_numpy(hash_keys(seed, 7, np.arange(mask.numel())).view(np.int64)).view(mask.shape)
    starts = None
    if plans_whole(flow):
        starts, sides = torch.zeros_like(z), (times[missing - 1], times[missing + 1])
        ends = [some_of(flow, np.flatnonzero(course.time == moment), rng) for moment in sides]
        first, last = (table[torch.from_numpy(some)] for some in ends)
        share = (time - sides[0]) / (sides[1] - sides[0])
        starts[:, missing] = starts_between(flow, first, last, share, B * N, rng).view(B, N, -1)
    made = flow.sample_trajectories({}, keys, recipe.sample, Places(mask, time_BT, seen, z, starts))[:, missing]
    cells = made.flatten(0, 1)[:n] * flow.vae.latent_std + flow.vae.latent_mean
    found: F32 = cells.numpy()
    return found
