"""The convention of the flow, held by a case with a closed form: a Gaussian mixture."""

from __future__ import annotations

import itertools
import math

import ot
import pytest
import torch
from torch import Tensor

from bgen.flow.guidance import guide
from bgen.flow.path import interpolate, velocity, velocity_from_data
from bgen.flow.solvers import integrate

MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]], dtype=torch.float64)
SCALES = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def mixture(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = torch.multinomial(WEIGHTS, n, replacement=True, generator=generator)
    return MEANS[k] + SCALES[k, None] * torch.randn(n, 2, generator=generator, dtype=torch.float64)


def exact_velocity(z: Tensor, t: float) -> Tensor:
    """E[z_1 - z_0 | z_t = z] when z_0 is the mixture and z_1 standard normal.

    Given component k, z_t is normal with mean (1-t) m_k and variance (1-t)^2 s_k^2 + t^2.
    """
    variance = (1 - t) ** 2 * SCALES**2 + t**2
    residual = z[:, None] - (1 - t) * MEANS
    log_density = WEIGHTS.log() - variance.log() - residual.square().sum(-1) / (2 * variance)
    posterior = torch.softmax(log_density, dim=1)[..., None]
    slope = (t - (1 - t) * SCALES**2) / variance
    return (posterior * (slope[:, None] * residual - MEANS)).sum(dim=1)


def energy_distance(x: Tensor, y: Tensor) -> float:
    between = torch.cdist(x, y).mean()
    within = torch.cdist(x, x).sum() / len(x) / (len(x) - 1) + torch.cdist(y, y).sum() / len(y) / (len(y) - 1)
    return (2 * between - within).item()


def noise(n: int, seed: int = 7) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_exact_velocity_is_the_regression_target_of_the_path() -> None:
    z0, z1 = mixture(400_000, 1), noise(400_000)
    t = 0.6
    z_t = interpolate(z0[:, None, None], z1[:, None, None], torch.full((400_000, 1), t, dtype=torch.float64))
    near = (z_t[:, 0, 0] - torch.tensor([0.5, 0.1])).norm(dim=1) < 0.1
    observed = velocity(z0, z1)[near]
    expected = exact_velocity(z_t[near][:, 0, 0], t).mean(dim=0)
    assert (observed.mean(dim=0) - expected).abs().max() < 5 * observed.std(dim=0).max() / math.sqrt(near.sum())


@pytest.mark.parametrize(("solver", "steps"), [("euler", 200), ("heun", 40), ("midpoint", 40)])
def test_exact_velocity_transports_noise_to_the_mixture(solver: str, steps: int) -> None:
    n = 2000
    generated = integrate(exact_velocity, noise(n), steps, solver)
    real, other = mixture(n, 2), mixture(n, 3)
    assert energy_distance(generated, real) < 0.005
    assert energy_distance(noise(n), real) > 0.1
    assert (generated.mean(0) - (WEIGHTS[:, None] * MEANS).sum(0)).abs().max() < 0.12
    assert (torch.cov(generated.T) - torch.cov(real.T)).abs().max() < 0.25
    emd = ot.emd2([], [], torch.cdist(generated, real).numpy())
    assert emd < 2 * ot.emd2([], [], torch.cdist(other, real).numpy())


def test_the_opposite_sign_would_not() -> None:
    generated = integrate(lambda z, t: -exact_velocity(z, t), noise(1000), 40, "heun")
    assert energy_distance(generated, mixture(1000, 2)) > 0.5


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_order_of_convergence(solver: str, order: int) -> None:
    # dz/dt = z cos(5t) has z(0) = z(1) exp(-sin(5)/5): smooth and not autonomous.
    z1 = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    exact = z1 * math.exp(-math.sin(5.0) / 5)
    errors = [
        (integrate(lambda z, t: z * math.cos(5 * t), z1, steps, solver) - exact).abs().max().item()
        for steps in (128, 256, 512)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_integration_runs_from_one_to_zero() -> None:
    seen = []

    def v(z: Tensor, t: float) -> Tensor:
        seen.append(t)
        return torch.ones_like(z)

    assert integrate(v, torch.zeros(1, 1), 4, "euler").item() == -1.0
    assert seen == [1.0, 0.75, 0.5, 0.25]


def test_data_prediction_gives_the_velocity_of_the_path() -> None:
    z0, z1 = torch.randn(5, 2, 3, 4), torch.randn(5, 2, 3, 4)
    t = torch.rand(5, 2) * 0.9 + 0.06
    torch.testing.assert_close(
        velocity_from_data(interpolate(z0, z1, t), z0, t), velocity(z0, z1), atol=1e-4, rtol=1e-4
    )
    assert velocity_from_data(z0, z1, torch.zeros(5, 2)).isfinite().all()


def test_guidance_one_is_conditional_and_zero_unconditional() -> None:
    z = torch.randn(3, 2)
    conditional, unconditional = (lambda z, t: 3 * z + t), (lambda z, t: -z)
    assert torch.equal(guide(conditional, unconditional, 1.0)(z, 0.5), conditional(z, 0.5))
    assert torch.equal(guide(conditional, unconditional, 0.0)(z, 0.5), unconditional(z, 0.5))
    torch.testing.assert_close(guide(conditional, unconditional, 2.0)(z, 0.5), -z + 2 * (4 * z + 0.5))
    limited = guide(conditional, unconditional, 2.0, (0.2, 0.6))
    assert torch.equal(limited(z, 0.7), conditional(z, 0.7))
    assert not torch.equal(limited(z, 0.6), conditional(z, 0.6))


def test_what_one_condition_adds_is_strengthened_by_itself() -> None:
    z = torch.randn(3, 2)
    conditional, unconditional, without = (lambda z, t: 3 * z + t), (lambda z, t: -z), (lambda z, t: z)
    one = guide(conditional, unconditional, 1.0, (0.2, 0.6), [(without, 2.0)])
    torch.testing.assert_close(one(z, 0.5), 2 * (3 * z + 0.5) - z)
    assert torch.equal(one(z, 0.7), conditional(z, 0.7))
    assert torch.equal(guide(conditional, unconditional, 1.0, without=[(without, 1.0)])(z, 0.5), conditional(z, 0.5))
    alike = guide(conditional, unconditional, 1.0, without=[(unconditional, 2.5)])  # the only condition: as of all
    torch.testing.assert_close(alike(z, 0.5), guide(conditional, unconditional, 2.5)(z, 0.5))
