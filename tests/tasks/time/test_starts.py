"""Forecasts of two fates, one of which doubles while the other stays: by growth, not by turning cells into others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bgen.bench.quality.time_latents import Course, Recipe, recipe, train
from bgen.config.flow import CouplingConfig
from bgen.models.generators.latent_flow import Places
from bgen.tasks.time.starts import some_of, starts_beside, starts_between

B, N = 12, 32
TRUE = 2 / 3  # share of the fate that doubles, at time 2; at time 1 it is a half


def two_fates() -> Course:
    """100, 200 and 400 cells of one fate and always 200 of the other, 6 apart; both drift by 1 a time unit."""
    rng = np.random.default_rng(0)
    populations = []
    for time in range(3):
        cells = rng.normal(size=(100 * 2**time + 200, 3))
        cells[: 100 * 2**time, 0] += 6
        cells[:, 1] += time
        populations.append(cells)
    return Course(np.concatenate(populations).astype(np.float32), np.repeat(np.arange(3.0), [300, 400, 600]))


def forecasting(growth: bool) -> Recipe:
    settings = recipe(steps=60, cells=N, forecast=True)
    patterns = settings.flow.patterns.model_copy(update={"interpolate": 0.0, "forecast": 1.0})
    coupling = CouplingConfig(cells=512, growth=growth)
    flow = settings.flow.model_copy(update={"coupling": coupling, "patterns": patterns})
    return Recipe(flow, settings.sample, settings.shape, settings.train)


def forecast_time_2(growth: bool, folder: Path) -> tuple[Tensor, Tensor]:
    """Train, and return which cells of the forecast begin in the fate that doubles, and which end there."""
    course, settings = two_fates(), forecasting(growth)
    flow = train(course, settings, 0, folder).eval()
    z, rng = flow.vae.table, np.random.default_rng(1)  # type: ignore[attr-defined]
    latents = torch.zeros(B, 3, N, 3)
    for t in (0, 1):
        latents[:, t] = z[torch.from_numpy(rng.choice(np.flatnonzero(course.time == t), (B, N)))]
    starts = torch.zeros_like(latents)
    last = z[torch.from_numpy(some_of(flow, np.flatnonzero(course.time == 1), rng))]
    starts[:, 2] = starts_beside(flow, last, {}, 1.0, B * N, rng).view(B, N, 3)
    seen = torch.tensor([True, True, False]).expand(B, 3)
    places = Places(torch.ones(B, 3, N, dtype=torch.bool), torch.arange(3.0).expand(B, 3), seen, latents, starts)
    made = flow.sample_trajectories({}, torch.arange(B * 3 * N).view(B, 3, N), settings.sample, places)
    doubling = [(cells[:, 2] * flow.vae.latent_std + flow.vae.latent_mean)[..., 0] > 3 for cells in (starts, made)]
    return doubling[0], doubling[1]


def test_a_fate_that_doubles_has_its_share_of_the_forecast(tmp_path: Path) -> None:
    begin, end = forecast_time_2(True, tmp_path / "growth")
    assert end.float().mean() == pytest.approx(TRUE, abs=0.04)
    assert (begin != end).float().mean() < 0.02  # nobody changes fate


@pytest.mark.slow
def test_without_growth_the_share_is_wrong_and_cells_change_fate(tmp_path: Path) -> None:
    begin, end = forecast_time_2(False, tmp_path / "alike")
    assert begin.float().mean() == pytest.approx(1 / 2, abs=0.02)
    assert end.float().mean() < TRUE - 0.08
    assert (begin != end).float().mean() > 0.03


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_between_two_populations_starts_end_in_both(share: float, tmp_path: Path) -> None:
    course, settings = two_fates(), forecasting(True)
    flow = train(
        course,
        Recipe(settings.flow, settings.sample, settings.shape, settings.train.model_copy(update={"steps": 1})),
        0,
        tmp_path / "run",
    )
    z = flow.vae.table  # type: ignore[attr-defined]
    before, after = (z[torch.from_numpy(course.time == t)] for t in (1, 2))
    made = starts_between(flow, before, after, share, 600, np.random.default_rng(0))
    distance = torch.cdist(made, after if share else before).min(1).values
    assert distance.max() < 1e-2
    doubling = (made[:, 0] > z[:, 0].mean()).float().mean()
    assert doubling == pytest.approx(TRUE if share else 1 / 2, abs=0.03)
