"""Starts that are planned over whole populations."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch

from bgen.flow.growth import BLUR
from bgen.flow.plans import Plans
from bgen.flow.start import couple, start

M, D, N = 400, 10, 16
SHIFT = 2.0
TIME = torch.tensor([[0.0, 1.0, 4.0]])
POPULATION = torch.tensor([[0, 1, 2]])
BETWEEN, BESIDE = torch.tensor([[True, False, True]]), torch.tensor([[True, False, False]])


def references() -> tuple[np.ndarray, np.ndarray]:
    """Three time points of a population that moves on by ``SHIFT`` a time unit along the first axis."""
    cells = np.random.default_rng(0).normal(size=(3, M, D)).astype(np.float32)
    cells[:, :, 0] += SHIFT * TIME.numpy().T
    return cells.reshape(-1, D), np.arange(4) * M


PLANS = Plans(*references())
MASK = torch.ones(1, 3, N, dtype=torch.bool)


def cells(seed: int) -> torch.Tensor:
    z = torch.randn(1, 3, N, D, generator=torch.Generator().manual_seed(seed))
    z[..., 0] += SHIFT * TIME[..., None]
    return z


def drawn(seed: int) -> torch.Tensor:
    return torch.rand(1, 3, N, generator=torch.Generator().manual_seed(seed))


NOISE = torch.full((1, 3, N, D), 99.0)


@pytest.mark.parametrize("observed", [BETWEEN, BESIDE])
def test_every_cell_starts_at_its_own_partner(observed: torch.Tensor) -> None:
    z, u = cells(1), drawn(1)
    z1 = PLANS.start(z, MASK, TIME, observed, NOISE, POPULATION, u)
    assert (z1[observed] == 99).all()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    permuted = PLANS.start(z[:, :, order], MASK, TIME, observed, NOISE, POPULATION, u[:, :, order])
    assert torch.equal(permuted, z1[:, :, order])
    mask = MASK.clone()
    mask[0, 1, 5:] = False
    fewer = PLANS.start(z, mask, TIME, observed, NOISE, POPULATION, u)
    assert torch.equal(fewer[0, 1, :5], z1[0, 1, :5])  # the others of a trajectory have no say
    assert (fewer[0, 1, 5:] == 99).all()
    assert (PLANS.start(z, MASK, TIME, torch.zeros_like(observed), NOISE, POPULATION, u) == 99).all()


def test_beside_one_neighbour_starts_are_its_cells() -> None:
    z1 = PLANS.start(cells(1), MASK, TIME, BESIDE, NOISE, POPULATION, drawn(1))
    reference = torch.from_numpy(PLANS.reference(0))
    assert (torch.cdist(z1[0, 1:].flatten(0, 1), reference).min(1).values < 1e-2).all()


def test_cells_of_a_reference_have_the_partners_of_the_entropic_plan() -> None:
    x, y = (PLANS.reference(number).astype(np.float64) for number in (1, 0))
    cost = ot.dist(x, y)
    plan = ot.sinkhorn(np.full(M, 1 / M), np.full(M, 1 / M), cost, BLUR * cost.mean(), stopThr=1e-10, numItermax=20_000)
    u = (np.arange(2000) + 0.5) / 2000
    for cell in (0, 7):
        found = PLANS.partners(np.repeat(PLANS.reference(1)[[cell]], 2000, 0), u, 0, 0, 1, 0.0)
        chosen = np.abs(found[:, None] - PLANS.reference(0)).sum(2).argmin(1)
        often = np.bincount(chosen, minlength=M) / 2000
        np.testing.assert_allclose(often, plan[cell] * M, atol=0.02)


def test_what_is_half_way_is_less_drawn_to_the_mean_than_between_few_cells() -> None:
    """Cells go straight on, so that those between have the spread of all, 1: pairs that cross would have less."""
    few, whole = [], []
    for seed in range(30):
        z = cells(seed)
        few.append(couple(z, start(z, MASK, TIME, BETWEEN, NOISE, torch.full((1, 3), seed)), MASK, ~BETWEEN)[0, 1])
        whole.append(PLANS.start(z, MASK, TIME, BETWEEN, NOISE, POPULATION, drawn(seed))[0, 1])
    spread_few, spread = (torch.cat(some).std(0)[1:].mean() for some in (few, whole))
    assert spread_few < spread - 0.03
    assert spread < 1
    way = torch.cat([cells(seed)[0, 1] for seed in range(30)]) - torch.cat(whole)
    longer = torch.cat([cells(seed)[0, 1] for seed in range(30)]) - torch.cat(few)
    assert way.square().sum(1).mean() < longer.square().sum(1).mean()


def test_populations_that_are_moved_keep_their_partners() -> None:
    moved = torch.randn(1, 3, D, generator=torch.Generator().manual_seed(5)) * 3
    plain = PLANS.start(cells(1), MASK, TIME, BETWEEN, NOISE, POPULATION, drawn(1))
    found = PLANS.start(cells(1), MASK, TIME, BETWEEN, NOISE, POPULATION, drawn(1), moved)
    expected = plain[0, 1] + moved[0, 0] + (moved[0, 2] - moved[0, 0]) / 4
    torch.testing.assert_close(found[0, 1], expected, rtol=1e-5, atol=1e-5)


def test_with_growth_cells_that_grow_are_the_start_of_more() -> None:
    early, late = np.random.default_rng(1).normal(size=(2, M, 3)).astype(np.float32)
    early[: M // 2, 0] += 8
    late[: 2 * M // 3, 0] += 8
    shares = {}
    for penalty in (None, 0.1):
        plans = Plans(np.concatenate([early, late]), np.array([0, M, 2 * M]), penalty)
        u = np.random.default_rng(2).random(M)
        shares[penalty] = (plans.partners(late, u, 0, 0, 1, 0.0)[:, 0] > 4).mean()
    assert shares[None] == pytest.approx(1 / 2, abs=0.03)
    assert shares[0.1] == pytest.approx(2 / 3, abs=0.04)
