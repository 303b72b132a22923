"""The compiled thinning of a CPU against the plain one that a GPU runs."""

from __future__ import annotations

import numpy as np
import torch

from bgen.data.batch import CellBatch
from bgen.models.vae import thinning
from bgen.models.vae.thinning import thin, thin_plainly
from bgen.models.vae.thinning_cpu import thin_small
from bgen.nn.random import Stream, row_state


def batch_of(cells: int, genes: int) -> CellBatch:
    generator = torch.Generator().manual_seed(0)
    counts = torch.poisson(torch.rand(cells, genes, generator=generator) * 3, generator=generator)
    counts[:, :5] *= torch.tensor([5.0, 20.0, 100.0, 500.0, 0.0])
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (counts > 0).sum(1).cumsum(0)))
    keys = torch.arange(cells) * 7919 - 1000
    return CellBatch(indptr, counts.nonzero()[:, 1].int(), counts[counts > 0], genes, keys, keys)


def test_the_compiled_form_draws_what_the_plain_one_draws() -> None:
    batch = batch_of(500, 200)
    before = batch.counts.clone()
    compiled, reference = thin(batch, 0.5), thin_plainly(batch, 0.5)
    assert torch.equal(batch.counts, before)
    # Rounding of a probability may tip one draw in a million.
    different = compiled != reference
    assert int(different.sum()) <= 2
    assert float((compiled - reference).abs().max()) <= 1
    assert 0.2 < float((compiled != before).float().mean()) < 0.4
    assert float(before.max()) > 500
    assert torch.equal(thin(batch, 0.0), before)


def test_a_walk_of_all_together_ends_where_each_walk_by_itself_does() -> None:
    n = torch.arange(1, 60.0).repeat(200)
    u, p = torch.rand(2, len(n), generator=torch.Generator().manual_seed(0))
    u[:59] = 1 - 1e-7  # these walk to the end
    given = n, p / (1 - p), u, torch.exp(n * torch.log1p(-p)), n <= 32
    alone, together = (walk(*given, torch.zeros_like(n)) for walk in (thinning._walk, thinning._walk_together))
    assert torch.equal(alone, together)
    assert float(alone.max()) == 32


def test_parts_of_the_cells_are_thinned_as_all_together() -> None:
    batch = batch_of(50, 200)
    state = row_state(batch.keys, Stream.THIN_COUNT).numpy().view(np.uint64)
    chosen, keep = np.arange(50) % 3 > 0, np.full(50, 0.5, np.float32)
    arrays = batch.indptr.numpy(), batch.indices.numpy(), batch.counts.numpy(), state, chosen, keep
    whole, parts = (thin_small(*arrays, 32, number) for number in (1, 4))
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(whole[1]) > 50
