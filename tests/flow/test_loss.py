"""The loss on where populations end."""

from __future__ import annotations

import torch
from scipy.spatial.distance import cdist

from bgen.flow.loss import endpoint_loss


def test_it_is_the_energy_distance_of_the_cells_that_count() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4) + 1
    mask = torch.ones(2, 3, 6, dtype=torch.bool)
    mask[0, 0, 4:] = False
    mask[0, 1, 1:] = False  # one cell says nothing of a population
    found = endpoint_loss(x, y, mask)
    expected = []
    for t, n in ((0, 4), (2, 6)):
        a, b = x[0, t, :n].numpy(), y[0, t, :n].numpy()
        within = (cdist(a, a).sum() + cdist(b, b).sum()) / (n * (n - 1))
        expected.append(2 * cdist(a, b).mean() - within)
    assert abs(float(found[0]) - sum(expected) / 2) < 0.01
    assert endpoint_loss(x, y, mask & False).tolist() == [0, 0]


def test_it_falls_where_populations_are_alike_however_cells_are_paired() -> None:
    torch.manual_seed(1)
    x = torch.randn(1, 1, 200, 3)
    mask = torch.ones(1, 1, 200, dtype=torch.bool)
    order = torch.randperm(200)
    near, far = (float(endpoint_loss(x, x[:, :, order] + shift, mask)) for shift in (0.0, 1.0))
    assert near < 0 < far  # of the same cells it is below 0, since distinct ones are compared
    assert abs(far - float(endpoint_loss(x, x + 1.0, mask))) < 1e-5
    x.requires_grad_()
    endpoint_loss(x, x.detach() + 1, mask).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert float(x.grad.mean()) < 0
