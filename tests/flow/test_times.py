from __future__ import annotations

import pytest
import torch
from scipy import stats

from bgen.flow.loss import velocity_loss
from bgen.flow.times import sample_times

KEYS = torch.arange(4096) * 31 + 5
SLOTS = torch.arange(4096)


@pytest.mark.parametrize(
    ("kind", "distribution"),
    [("uniform", "uniform"), ("stratified", "uniform"), ("logit_normal", None)],
)
def test_distribution(kind: str, distribution: str | None) -> None:
    t = sample_times(kind, KEYS, SLOTS, 3)
    assert t.shape == (4096,)
    assert ((t > 0) & (t < 1)).all()
    x, reference = (t.numpy(), "uniform") if distribution else (torch.logit(t.double()).numpy(), "norm")
    assert stats.kstest(x, reference).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["uniform", "stratified", "logit_normal"])
def test_a_slice_of_the_batch_draws_its_own_times(kind: str) -> None:
    whole = sample_times(kind, KEYS, SLOTS, 3)
    assert torch.equal(sample_times(kind, KEYS[100:164], SLOTS[100:164], 3), whole[100:164])


def test_stratified_fills_every_cell_of_the_interval_and_moves_with_the_step() -> None:
    t = sample_times("stratified", KEYS[:64], SLOTS[:64], 3)
    assert t.sort().values.diff().max() < 2.7 / 64
    assert sample_times("uniform", KEYS[:64], SLOTS[:64], 3).sort().values.diff().max() > 2.7 / 64
    assert not torch.equal(sample_times("stratified", KEYS[:64], SLOTS[:64], 4), t)
    first = torch.stack([sample_times("stratified", KEYS[:1], SLOTS[:1], step) for step in range(500)])
    assert stats.kstest(first.flatten().numpy(), "uniform").pvalue > 1e-3


def test_times_at_two_places_are_independent() -> None:
    slots, places = torch.arange(64).repeat_interleave(4), torch.arange(4).repeat(64)
    drawn = [sample_times("stratified", slots, slots, step, places).view(64, 4) for step in range(300)]
    t = torch.stack(drawn).flatten(0, 1)
    assert (t[:, :2] < 0.3).all(1).float().mean() == pytest.approx(0.09, abs=0.03)
    assert (t < 0.5).all(1).float().mean() == pytest.approx(0.0625, abs=0.03)
    assert drawn[0][:, 2].sort().values.diff().max() < 2.7 / 64  # and still spread evenly over the batch
    assert torch.equal(drawn[3][:, 0], sample_times("stratified", slots[::4], slots[::4], 3))


def test_loss_is_the_masked_mean() -> None:
    predicted, target = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    mask = torch.rand(2, 3, 4) < 0.5
    mask[1] = False
    expected = (predicted[0] - target[0]).square()[mask[0]].mean()
    torch.testing.assert_close(velocity_loss(predicted, target, mask), torch.stack((expected, torch.tensor(0.0))))
    full = velocity_loss(predicted, target)
    torch.testing.assert_close(full, (predicted - target).square().flatten(1).mean(1))
