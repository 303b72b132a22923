from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bgen.flow.patterns import PATTERNS, draw_observed, forecast, interpolate, perturb

B, T = 4000, 5


def grid(*rows: str) -> Tensor:
    return torch.tensor([[c == "x" for c in row] for row in rows])


def draw(exists: Tensor, control: Tensor | None = None, **weights: float) -> Tensor:
    control = torch.zeros_like(exists) if control is None else control
    return draw_observed(torch.arange(len(exists)), exists, control, dict.fromkeys(PATTERNS, 0.0) | weights)


def test_patterns_by_hand() -> None:
    exists = grid("xxxx.", "x.xx.")
    assert torch.equal(forecast(exists, 2), grid("xx...", "x.x.."))
    assert torch.equal(forecast(exists, torch.tensor([1, 3])), grid("x....", "x.xx."))
    assert torch.equal(interpolate(exists, 1), grid("x.xx.", "x..x."))
    assert torch.equal(perturb(exists, grid("x...x", "xx...")), grid("x....", "x...."))


def test_forecast_observes_a_past_of_every_length_alike() -> None:
    exists = grid("xx.xx").expand(B, T)
    observed = draw(exists, forecast=1.0)
    length = observed.sum(1)
    for k in (1, 2, 3):
        assert abs((length == k).float().mean() - 1 / 3) < 0.03
        assert torch.equal(observed[length == k], forecast(exists, k)[length == k])


def test_interpolation_leaves_one_point_between_others() -> None:
    observed = draw(grid("xxx.x").expand(B, T), interpolate=1.0)
    missing = grid("xxx.x") & ~observed
    assert (missing.sum(1) == 1).all()
    assert abs(missing.float().mean(0) - torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0])).max() < 0.03


def test_a_pattern_that_cannot_be_is_left_out() -> None:
    one, two, control = grid("..x.."), grid("x..x."), grid("x....")
    assert not draw(one.expand(B, T), forecast=1.0, interpolate=1.0, perturb=1.0).any()
    observed = draw(two.expand(B, T), forecast=1.0, interpolate=5.0, perturb=5.0)
    assert torch.equal(observed, grid("x....").expand(B, T))  # only a forecast can be
    assert not draw(control.expand(B, T), control.expand(B, T), perturb=1.0).any()  # nothing would be left


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (1, 0, 0, 3), (0, 2, 1, 1)])
def test_patterns_come_as_often_as_they_weigh(weights: tuple[int, ...]) -> None:
    exists, control = grid("xxxxx").expand(B, T), grid("....x").expand(B, T)  # so that no two patterns look alike
    observed = draw(exists, control, **dict(zip(PATTERNS, map(float, weights), strict=True)))
    n = observed.sum(1)
    is_forecast = observed[:, 0] & ~observed[:, -1]
    found = [n == 0, is_forecast, (n == 4) & observed[:, -1], (n == 1) & observed[:, -1]]
    for mask, weight in zip(found, weights, strict=True):
        assert abs(mask.float().mean() - weight / sum(weights)) < 0.03
    assert (exists & ~observed).any(1).all()


def test_the_draw_depends_on_the_key_alone() -> None:
    exists = torch.ones(20, T, dtype=torch.bool)
    whole = draw(exists, noise=1.0, forecast=1.0, interpolate=1.0)
    part = draw_observed(
        torch.arange(5, 9), exists[5:9], ~exists[5:9], {"noise": 1, "forecast": 1, "interpolate": 1, "perturb": 0}
    )
    assert torch.equal(part, whole[5:9])
