"""Measured cells under other expectations: distributed as the model says, and otherwise themselves."""

from __future__ import annotations

import pytest
import torch

from bgen.models.generators.counterfactual import change_counts
from bgen.models.likelihoods.negative_binomial import NegativeBinomial

CELLS, THETA = 20_000, 2.0
MEANS = torch.tensor([0.3, 4.0, 60.0])


def expecting(means: torch.Tensor) -> NegativeBinomial:
    """Cells whose genes have these means."""
    logits = means.log().expand(CELLS, -1)
    return NegativeBinomial(logits, means.sum().expand(CELLS), torch.tensor(THETA).log().expand(len(means)))


@pytest.fixture(scope="module")
def counts() -> torch.Tensor:
    return expecting(MEANS).sample(torch.arange(CELLS)).float()


def test_without_change_cells_stay_what_they_are(counts: torch.Tensor) -> None:
    same = expecting(MEANS)
    assert torch.equal(change_counts(counts, same, same, torch.arange(CELLS)), counts)


@pytest.mark.parametrize("fold", [0.25, 3.0])
def test_changed_counts_have_the_distribution_asked_for_and_follow_their_own_cell(
    counts: torch.Tensor, fold: float
) -> None:
    wanted = MEANS * fold
    keys = torch.arange(CELLS) + CELLS
    made = change_counts(counts, expecting(MEANS), expecting(wanted), keys)
    assert torch.equal(made, made.round())
    assert (made >= 0).all()
    torch.testing.assert_close(made.mean(0), wanted, rtol=0.05, atol=0)
    torch.testing.assert_close(made.var(0), wanted + wanted**2 / THETA, rtol=0.1, atol=0)
    assert ((made <= counts) if fold < 1 else (made >= counts)).all()
    own = torch.tensor([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(made.T, counts.T, strict=True)])
    assert (own > 0.5).all()


def test_the_average_of_few_cells_changes_by_what_it_should() -> None:
    """Independent draws would be off by 0.07 (standard deviation)."""
    counts = torch.ones(100, 3)
    before, after = (
        NegativeBinomial(torch.zeros(100, 3), torch.full((100,), 3 * mean), torch.full((3,), 14.0))
        for mean in (1.0, 0.5)
    )
    lost = [1 - change_counts(counts, before, after, torch.arange(100) + 100 * k).mean(0) for k in range(5)]
    added = [change_counts(counts, after, before, torch.arange(100) + 100 * k).mean(0) - 1 for k in range(5)]
    torch.testing.assert_close(torch.cat([*lost, *added]), torch.full((30,), 0.5), rtol=0, atol=0.02)


def test_the_cells_of_each_count_change_by_what_they_should() -> None:
    """Numbers spread evenly over all cells alone would leave those of a count off by 0.07 (standard deviation)."""
    counts = torch.ones(100, 30)
    counts[:50] = 2
    before, after = (
        NegativeBinomial(torch.zeros(100, 30), torch.full((100,), 30 * mean), torch.full((30,), 14.0))
        for mean in (1.0, 0.5)
    )
    lost = counts - change_counts(counts, before, after, torch.arange(100))
    torch.testing.assert_close(lost[:50].mean(0), torch.ones(30), rtol=0, atol=0.05)
    torch.testing.assert_close(lost[50:].mean(0), torch.full((30,), 0.5), rtol=0, atol=0.05)
