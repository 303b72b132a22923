"""Where paths start: neighbours, their displacement interpolation, or noise."""

from __future__ import annotations

import math

import torch

from bgen.flow.start import BESIDE, BETWEEN, KINDS, NOISE, couple, neighbours, start, starts_of

B, T, N, D = 2, 4, 6, 3
EXISTS = torch.tensor([[True, True, True, True], [True, True, True, False]])
OBSERVED = torch.tensor([[True, False, False, True], [False, True, False, False]])
TIME = torch.tensor([[0.0, 1.0, 3.0, 4.0], [0.0, 2.0, 5.0, 5.0]])
MASK = EXISTS[..., None].expand(B, T, N).clone()
SHIFT = torch.tensor([8.0, 0.0, -4.0])


def cells() -> torch.Tensor:
    z = torch.randn(B, T, N, D, generator=torch.Generator().manual_seed(0))
    z[0, 3] = z[0, 0].flip(0) + SHIFT
    return z


def test_neighbours_are_the_nearest_observed_ones() -> None:
    before, after = neighbours(EXISTS, OBSERVED)
    assert before.tolist() == [[-1, 0, 0, 0], [-1, -1, 1, 1]]
    assert after.tolist() == [[3, 3, 3, -1], [1, -1, -1, -1]]


def test_starts_are_on_the_line_beside_or_noise() -> None:
    z, noise = cells(), torch.full((B, T, N, D), 99.0)
    seeds = torch.arange(B * T).view(B, T)
    z1 = start(z, MASK, TIME, OBSERVED, noise, seeds)
    for t, share in ((1, 0.25), (2, 0.75)):
        expected = z[0, 0] + share * SHIFT
        torch.testing.assert_close(z1[0, t].sort(0).values, expected.sort(0).values)
    torch.testing.assert_close(z1[1, 0].sort(0).values, z[1, 1].sort(0).values)  # backwards
    torch.testing.assert_close(z1[1, 2].sort(0).values, z[1, 1].sort(0).values)  # forwards
    assert (z1[OBSERVED] == 99).all()
    assert (start(z, MASK, TIME, torch.zeros_like(OBSERVED), noise, seeds) == 99).all()
    hidden = z.clone()
    hidden[~OBSERVED] = torch.nan
    assert torch.equal(start(hidden, MASK, TIME, OBSERVED, noise, seeds), z1)
    assert torch.equal(start(z, MASK, TIME, OBSERVED, noise, seeds), z1)


def test_missing_cells_take_no_part() -> None:
    mask = MASK.clone()
    mask[0, 0, 4:] = False
    mask[0, 1, 2:] = False
    z = cells()
    z[0, 0, 4:] = 1e6
    z1 = start(z, mask, TIME, OBSERVED, torch.full((B, T, N, D), 99.0), torch.zeros(B, T, dtype=torch.int64))
    assert z1[0, 1, :2].abs().max() < 20
    assert (z1[0, 1, 2:] == 99).all()


def test_coupling_permutes_cells_of_moving_time_points_towards_their_partners() -> None:
    z0 = cells()
    z1 = z0[:, :, torch.randperm(N, generator=torch.Generator().manual_seed(1))] + 0.01
    moving = ~OBSERVED
    paired = couple(z0, z1, MASK, moving)
    close = (paired - z0 - 0.01).abs().amax((2, 3)) < 1e-5
    assert torch.equal(close, moving & EXISTS)
    assert torch.equal(paired[~(moving & EXISTS)], z1[~(moving & EXISTS)])


def test_between_neighbours_the_reach_is_what_a_straight_line_misses_of_a_parabola() -> None:
    found = starts_of(TIME, EXISTS, OBSERVED, 2.0)
    path = TIME.square()
    line = path[0, 0] + (path[0, 3] - path[0, 0]) * TIME[0, 1] / 4
    # Half the acceleration of t^2 is 1, in units of scale^2 it is 4.
    torch.testing.assert_close(path[0, 1] - line, -found.reach[0, 1] * 4)
    assert found.kind[0, 1:3].tolist() == [BETWEEN] * 2


def test_beside_the_nearest_the_reach_grows_with_the_time_since_and_is_bounded() -> None:
    found = starts_of(TIME, EXISTS, OBSERVED, 2.0)
    assert found.kind[1, [0, 2]].tolist() == [BESIDE] * 2
    expected = torch.tensor([math.exp(-1.0) - 1, 1 - math.exp(-1.5)])  # two before, three after; at a scale of 2
    torch.testing.assert_close(found.reach[1, [0, 2]], expected)
    joint = starts_of(TIME, EXISTS, torch.zeros_like(OBSERVED), 2.0)
    assert (joint.kind == NOISE).all()
    assert (joint.reach == 1).all()


def test_every_kind_of_start_has_an_output_of_its_own() -> None:
    found = starts_of(TIME, EXISTS, OBSERVED, 2.0)
    outputs = torch.stack([torch.full((B, T, N, D), 10.0**kind) for kind in KINDS], 3).flatten(3)
    expected = 10.0**found.kind * found.reach
    assert torch.equal(found.velocity(outputs), expected[..., None, None].expand(B, T, N, D))
