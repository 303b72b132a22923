"""A hybrid flow on a time course of measured latents: train without one time point, then generate that one.

Axes: B trajectories, T time points, N cells per time point, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bgen.arrays import F32
from bgen.config.flow import FlowConfig, SampleConfig
from bgen.data.trajectory_batch import batch_of_grids
from bgen.models.generators.latent_flow import LatentFlow, Places
from bgen.models.vae.measured_latents import MeasuredLatents
from bgen.order.keys import hash_keys
from bgen.order.trajectories import Trajectories, TrajectoryOrder
from bgen.tasks.finetune.course import neighbour_flow


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
    """How a benchmark's flow is trained: the flow's settings, and the optimiser's."""

    flow: FlowConfig
    sample: SampleConfig
    times: int
    cells: int
    batch: int
    steps: int
    learning_rate: float
    ema: float


def recipe(
    *, steps: int | None = None, scale: float = 1.0, cells: int = 128, forecast: bool = False, solver_steps: int = 4
) -> Recipe:
    """Return the one recipe of all courses; ``scale`` is a typical gap in time, ``forecast``: a third trains that."""
    return Recipe(
        neighbour_flow(scale, forecast=forecast),
        SampleConfig(steps=solver_steps),
        times=3,
        cells=cells,
        batch=4,
        steps=steps or 300,
        learning_rate=2e-3,
        ema=0.99,
    )


def train(course: Course, recipe: Recipe, seed: int) -> LatentFlow:
    """Train on trajectories of a whole course; returns the moving average of the weights."""
    torch.manual_seed(seed)
    centre, spread = course.cells.mean(0), course.cells.std()
    table = torch.from_numpy((course.cells - centre) / spread)
    vae = MeasuredLatents(table)
    vae.latent_mean.copy_(torch.from_numpy(centre))
    vae.latent_std.fill_(float(spread))
    times = np.array(course.times)
    flow = LatentFlow(recipe.flow, vae, {}, {"time": (times.mean(), times.std())} if recipe.flow.conditions else {})
    n = len(course.cells)
    order = TrajectoryOrder(
        Trajectories.over_time(np.arange(n), [], course.time, np.zeros(n, bool)),
        batch=recipe.batch,
        times=recipe.times,
        cells=recipe.cells,
        seed=seed,
        name="bench",
    )
    parameters = [p for p in flow.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
    average = [p.detach().clone() for p in parameters]
    places = recipe.batch * recipe.times * recipe.cells
    flow.train()
    for step in range(recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / 50) * (1 - step / recipe.steps)
        keys = torch.from_numpy(hash_keys(seed, step, np.arange(places)).view(np.int64))
        loss = flow(batch_of_grids(order.read(step), keys, step))["loss"].mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        for kept, p in zip(average, parameters, strict=True):
            kept.lerp_(p.detach(), 1 - min(recipe.ema, (1 + step) / (10 + step)))
    for kept, p in zip(average, parameters, strict=True):
        p.data.copy_(kept)
    return flow.eval()


def generate(flow: LatentFlow, course: Course, time: float, n: int, recipe: Recipe, seed: int) -> F32:
    """Generate n cells at a missing time from the observed ones around it, by interpolation: ``[n, D]``."""
    there = course.times
    chosen = sorted(sorted(there, key=lambda other: abs(other - time))[: recipe.times - 1])
    if not chosen[0] < time < chosen[-1]:
        before, after = [t for t in there if t < time], [t for t in there if t > time]
        chosen = [before[-1], after[0]]
    rng = np.random.default_rng([seed, 3])
    assert isinstance(flow.vae, MeasuredLatents)
    table = flow.vae.table
    N, B = recipe.cells, -(-n // recipe.cells)
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
    conditions: dict[str, Tensor] = {"time": time_BT} if recipe.flow.conditions else {}
    made = flow.sample_trajectories(conditions, keys, recipe.sample, Places(mask, time_BT, seen, z))[:, missing]
    cells = made.flatten(0, 1)[:n] * flow.vae.latent_std + flow.vae.latent_mean
    found: F32 = cells.numpy()
    return found
