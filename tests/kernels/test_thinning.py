"""Our kernel of thinning against the plain form: the same counts to the bit."""

from __future__ import annotations

import pytest
import torch

from bgen.data.batch import CellBatch
from bgen.models.vae import thinning
from bgen.models.vae.thinning import thin, thin_plainly
from bgen.nn.gpu import thinning as on_gpu

NEEDED = ("triton",)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KEYS = torch.tensor([0, -1, 2**63 - 1, -(2**63), 7919, 5, 6, 11])


@pytest.fixture(autouse=True)
def on_kernels(kernels_run_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinning, "usable", lambda counts: True)
    monkeypatch.setattr(on_gpu._kernels(), "ENTRIES", 64)  # a program shall not hold all of a cell


def made(genes: int) -> CellBatch:
    """Small counts and large ones, some that float32 just holds, and a cell without any."""
    g = torch.Generator().manual_seed(genes)
    counts = torch.poisson(torch.rand(len(KEYS), genes, generator=g) * 3, generator=g)
    for every, most in ((5, 31), (7, 32), (9, 33), (11, 400), (13, 1 << 24)):
        counts[:, ::every] = torch.randint(most // 2, most + 1, counts[:, ::every].shape, generator=g).float()
    counts[3] = 0
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (counts > 0).sum(1).cumsum(0)))
    given = indptr, counts.nonzero()[:, 1].int(), counts[counts > 0]
    return CellBatch(*given, genes, KEYS, KEYS).to(DEVICE)


@pytest.mark.parametrize("genes", [1, 301])
def test_counts_are_those_of_the_plain_form(genes: int) -> None:
    batch = made(genes)
    before = batch.counts.clone()
    found = thin(batch, 0.7)
    assert torch.equal(found, thin_plainly(batch, 0.7))
    assert torch.equal(batch.counts, before)
    if genes > 1:
        changed = (found != before).float()
        small = before <= on_gpu.EXACT
        assert 0.2 < float(changed[small].mean()) < 0.8
        assert 0.2 < float(changed[~small].mean()) < 0.95


def test_every_number_that_can_be_drawn_has_its_quantile() -> None:
    inverses, quantiles = on_gpu._tables(DEVICE)
    number = torch.tensor([0, 1, 4_000_000, (1 << 23) - 1], device=DEVICE)
    assert torch.equal(quantiles[number], torch.special.ndtri((number + 0.5).float() * 2.0**-23))
    assert len(quantiles) == 1 << 23
    assert bool(quantiles.isfinite().all())
    assert torch.equal(inverses, 1 / torch.arange(1.0, on_gpu.EXACT + 1, device=DEVICE))


def test_it_is_an_operator_that_can_be_traced() -> None:
    batch = made(5)
    given = batch.indptr, batch.indices, batch.counts, batch.keys, torch.full((len(batch),), 0.5, device=DEVICE), 3
    torch.library.opcheck(torch.ops.bgen.thin, given, test_utils=("test_schema", "test_faketensor"))
