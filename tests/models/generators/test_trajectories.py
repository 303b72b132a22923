"""The flow over trajectories of populations: what counts in the loss, what is observed, what is generated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bgen.config.backbone import BackboneConfig
from bgen.config.flow import FlowConfig, PatternsConfig, SampleConfig
from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.data.trajectory_batch import TrajectoryBatch
from bgen.flow.patterns import forecast
from bgen.models.generators.latent_flow import LatentFlow, Places
from bgen.models.vae.vae import VAE

B, T, N, G = 4, 3, 5, 12
NOISE = {"noise": 1.0, "forecast": 0.0, "interpolate": 0.0, "perturb": 0.0, "independent": 1.0}
HYBRID = {"name": "hybrid", "layers": 1, "time": {"tokens": 2}, "mamba2": {"head_width": 8, "state": 4}}


def flow(backbone: dict[str, Any], **patterns: float) -> LatentFlow:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(latent=2, hidden=8), G, {})
    config = FlowConfig(
        backbone=BackboneConfig.model_validate({"width": 16, "layers": 2} | backbone),
        patterns=PatternsConfig.model_validate(NOISE | patterns),
    )
    model = LatentFlow(config, vae, {"cell_type": 2}, {"time": (12.0, 6.0)})
    for name, parameter in model.backbone.named_parameters():  # what starts at zero hides what it is fed
        if "modulation" in name or "head" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(trajectories: int = B, first: int = 0) -> TrajectoryBatch:
    n = trajectories * T * N
    counts = torch.poisson(torch.full((100 * N, G), 3.0), generator=torch.Generator().manual_seed(0)) + 1
    where = torch.arange(first * T * N, first * T * N + n)
    time = (torch.arange(T) * 6.0).expand(trajectories, T)
    cells = CellBatch(
        torch.arange(n + 1) * G,
        torch.arange(G).repeat(n).int(),
        counts[where].flatten(),
        G,
        where,
        where,
        first_slot=first * T * N,
        obs={"cell_type": where // (T * N) % 2, "time": time[..., None].expand(-1, -1, N).flatten().contiguous()},
    )
    mask = torch.ones(trajectories, T, N, dtype=torch.bool)
    return TrajectoryBatch.of(cells, mask, time, torch.zeros(trajectories, T, dtype=torch.bool))


def test_the_grid_survives_a_move_and_knows_what_a_population_shares() -> None:
    given = batch().to("cpu")
    assert isinstance(given, TrajectoryBatch)
    assert given.mask.shape == (B, T, N)
    given.obs["cell_type"] = given.obs["cell_type"].clone()
    given.obs["cell_type"][1] = 1 - given.obs["cell_type"][1]  # the second cell of the first population
    given.mask[0, 1, 0] = False
    given.mask[1, 2] = False
    shared = given.population_obs()
    assert shared["cell_type"].view(B, T).tolist() == [[-1, 0, 0], [1, 1, -1], [0, 0, 0], [1, 1, 1]]
    given.mask[0, 0, 1] = False
    assert given.population_obs()["cell_type"][0] == 0
    assert shared["time"].view(B, T)[0].tolist() == [0.0, 6.0, 12.0]
    assert shared["time"].view(B, T)[1, 2].isnan()


def test_trajectories_of_one_cell_are_static_cells() -> None:
    model, given = flow({}).eval(), batch()
    static = CellBatch(given.indptr, given.indices, given.counts, G, given.keys, given.cells, obs=given.obs)
    n = len(static)
    one = TrajectoryBatch.of(
        static, torch.ones(n, 1, 1, dtype=torch.bool), torch.zeros(n, 1), torch.zeros(n, 1, dtype=torch.bool)
    )
    assert torch.equal(model(one)["loss"], model(static)["loss"])


@pytest.mark.parametrize("training", [True, False])
def test_a_trajectory_does_not_feel_the_others_of_its_micro_batch(training: bool) -> None:
    model = flow(HYBRID, forecast=1.0, interpolate=1.0, independent=0.5).train(training)
    whole = model(batch())["loss"]
    assert whole.shape == (B * T * N,)
    parts = [model(batch(n, first))["loss"] for first, n in [(0, 1), (1, 2), (3, 1)]]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)


def test_observed_time_points_and_missing_cells_do_not_count() -> None:
    model = flow({"name": "mlp"}, noise=0.0, forecast=1.0).eval()
    seen: dict[str, Tensor] = {}

    def remember(module: Any, args: tuple[Tensor, ...]) -> None:
        seen["z"], seen["t"] = args[0], args[1]

    model.backbone.register_forward_pre_hook(remember)
    given = batch()
    given.mask[:, :, 3:] = False
    loss = model(given)["loss"].view(B, T, N)
    observed = seen["t"] == 0
    assert torch.equal(observed, forecast(given.exists, observed.sum(1)))
    assert (observed.sum(1) >= 1).all()
    assert (~observed).any(1).all()
    assert (loss == loss[:, :1, :1]).all()
    latents = model.vae.latents(given).view(B, T, N, -1)
    assert torch.equal(seen["z"][observed], latents[observed])
    # Without mixing, what a cell adds depends on itself: changed cells that do not count leave the loss as it was.
    keys = given.keys.clone().view(B, T, N)
    keys[:, :, 3:] += 1000
    assert torch.equal(model(replace(given, keys=keys.flatten()))["loss"].view(B, T, N), loss)
    counts = given.counts.clone().view(B, T, N, G)
    counts[observed] += 7
    changed = replace(given, counts=counts.flatten())
    assert torch.equal(model(changed)["loss"].view(B, T, N), loss)
    counts[~observed] += 7
    assert not torch.equal(model(replace(given, counts=counts.flatten()))["loss"].view(B, T, N), loss)


def test_a_flow_from_neighbours_learns_velocities() -> None:
    with pytest.raises(ValueError, match="learns velocities"):
        FlowConfig(source="neighbours", prediction="data")


def test_flow_times_are_shared_or_independent_as_the_setting_says() -> None:
    for independent in (0.0, 1.0):
        model, times = flow({"name": "mlp"}, independent=independent), []
        model.backbone.register_forward_pre_hook(lambda _, args, times=times: times.append(args[1]))
        model(batch())
        spread = times[0].amax(1) - times[0].amin(1)
        assert (spread > 0).all() if independent else (spread == 0).all()


def places(**changes: Any) -> Places:
    g = torch.Generator().manual_seed(3)
    given = Places(
        mask=torch.ones(B, T, N, dtype=torch.bool),
        time=(torch.arange(T) * 6.0).expand(B, T),
        observed=forecast(torch.ones(B, T, dtype=torch.bool), 2),
        latents=torch.randn(B, T, N, 3, generator=g),
    )
    return replace(given, **changes)


KEYS = torch.arange(B * T * N).view(B, T, N)
SETTINGS = SampleConfig(steps=3, guidance=1.5)


def test_what_is_observed_stays_and_shapes_the_rest() -> None:
    model, given = flow(HYBRID).eval(), places()
    assert given.latents is not None
    conditions = {"cell_type": torch.zeros(B, T, dtype=torch.int64), "time": given.time}
    times: list[Tensor] = []
    hook = model.backbone.register_forward_pre_hook(lambda _, args: times.append(args[1]))
    z = model.sample_trajectories(conditions, KEYS, SETTINGS, given)
    hook.remove()
    assert all((t[:, :2] == 0).all() for t in times)  # the network is told that they are data
    assert times[0][:, 2].tolist() == [1.0] * B
    assert torch.equal(z[:, :2], given.latents[:, :2])
    later = given.latents.clone()
    later[:, 2] = torch.nan  # what is not observed is not read
    assert torch.equal(model.sample_trajectories(conditions, KEYS, SETTINGS, places(latents=later)), z)
    past = given.latents.clone()
    past[0, :2] += 2.0
    moved = model.sample_trajectories(conditions, KEYS, SETTINGS, places(latents=past))
    assert not torch.allclose(moved[0, 2], z[0, 2], rtol=0, atol=2e-5)
    torch.testing.assert_close(moved[1:], z[1:], rtol=0, atol=2e-6)


def test_cells_that_do_not_exist_are_zero_and_do_nothing() -> None:
    model, given = flow(HYBRID).eval(), places(observed=None, latents=None)
    whole = model.sample_trajectories({}, KEYS, SETTINGS, given)
    mask = given.mask.clone()
    mask[:, 1, 2:] = False
    masked = model.sample_trajectories({}, KEYS, SETTINGS, replace(given, mask=mask))
    assert (masked[~mask] == 0).all()
    assert not torch.allclose(masked[:, 2], whole[:, 2])
    other = KEYS.clone()
    other[~mask] += 999
    again = model.sample_trajectories({}, other, SETTINGS, replace(given, mask=mask))
    torch.testing.assert_close(again, masked, rtol=1e-5, atol=1e-6)


def test_a_fixed_library_is_met_exactly_on_trajectories() -> None:
    model, given = flow(HYBRID).eval(), places(observed=None, latents=None)
    model.vae.latent_mean[-1], model.vae.latent_std[-1] = 4.0, 0.5
    wanted = torch.linspace(3.0, 5.0, B * T * N).view(B, T, N)
    z = model.sample_trajectories({}, KEYS, SETTINGS, given, log_library=wanted)
    torch.testing.assert_close(z[..., -1] * 0.5 + 4.0, wanted, rtol=1e-5, atol=1e-5)


def test_a_fixed_library_is_met_exactly_from_a_start_at_neighbours() -> None:
    model = flow(HYBRID).eval()
    model.config = model.config.model_copy(update={"source": "neighbours"})
    observed = torch.ones(B, T, dtype=torch.bool)
    observed[:, 1] = False
    given = places(observed=observed)
    model.vae.latent_mean[-1], model.vae.latent_std[-1] = 4.0, 0.5
    wanted = torch.linspace(3.0, 5.0, B * T * N).view(B, T, N)
    z = model.sample_trajectories({}, KEYS, SETTINGS, given, log_library=wanted)
    reached = z[:, 1, :, -1] * 0.5 + 4.0
    torch.testing.assert_close(reached, wanted[:, 1], rtol=1e-5, atol=1e-5)


class Drifting(VAE):
    """Latents whose mean is drawn per trajectory and moves on by 1 per time point: only the past tells where it is."""

    def latents(self, batch: CellBatch) -> Tensor:
        assert isinstance(batch, TrajectoryBatch)
        b, t, n = batch.mask.shape
        start = 2 * torch.randn(b, 1, 1, generator=torch.Generator().manual_seed(int(batch.keys[0])))
        z = (start + torch.arange(t)[None, :, None]).expand(b, t, n) + 0.1 * torch.randn(b, t, n)
        return torch.stack((z, torch.randn(b, t, n)), dim=-1).flatten(0, 2)


@pytest.mark.slow
def test_a_forecast_follows_the_past() -> None:
    torch.manual_seed(0)
    config = FlowConfig(
        backbone=BackboneConfig.model_validate(HYBRID | {"width": 32, "layers": 2}),
        patterns=PatternsConfig(noise=0, forecast=1, interpolate=0, perturb=0),
    )
    model = LatentFlow(config, Drifting(VAEConfig(latent=1, hidden=8), G, {}), {}, {})
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    given = batch(16)
    for step in range(1000):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (1 - step / 1000)
        model(replace(given, keys=given.keys + 1000 * step, step=step))["loss"].mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    start = torch.tensor([-2.0, 0.0, 1.0, 2.0])
    past = start[:, None, None] + torch.arange(T)[None, :, None] + 0.1 * torch.randn(4, T, N)
    known = places(latents=torch.stack((past, torch.randn(4, T, N)), dim=-1))
    z = model.sample_trajectories({}, KEYS, SampleConfig(steps=10), known)
    assert (z[:, 2, :, 0].mean(1) - (start + 2)).abs().mean() < 0.6
