"""The separable read against softmax attention, cell by cell; what an empty set is; the order of stored counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bgen.data.batch import CellBatch
from bgen.models.vae.set_read import SetRead

G, E, M, H, P = 30, 6, 3, 2, 4


def cells(dense: Tensor) -> CellBatch:
    rows, genes = dense.nonzero(as_tuple=True)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)))
    ids = torch.arange(len(dense))
    return CellBatch(indptr, genes.int(), dense[rows, genes], dense.shape[1], keys=ids, cells=ids)


def some_cells(n: int = 7) -> CellBatch:
    """Cells of few genes, of which the third expresses none."""
    g = torch.Generator().manual_seed(3)
    dense = (1 + torch.poisson(torch.full((n, G), 2.0), generator=g)) * (torch.rand(n, G, generator=g) < 0.25)
    dense[2] = 0
    return cells(dense)


def reader(values: bool = True, attention: bool = True) -> SetRead:
    torch.manual_seed(1)
    return SetRead(E, M, H * P, H, values=values, attention=attention)


def read_plain(read: SetRead, genes: Tensor, batch: CellBatch, weight: Tensor, value: Tensor) -> Tensor:
    """Attend by the formula, one cell, token and head at a time: softmax over the expressed genes."""
    out = []
    for cell in range(len(batch)):
        mine = slice(int(batch.indptr[cell]), int(batch.indptr[cell + 1]))
        w, s, e = weight[mine], value[mine], genes[batch.indices[mine].long()]
        there = w > 0
        w, s, e = w[there], s[there], e[there]
        tokens = []
        for m in range(M):
            for h in range(H):
                channel = slice(h * P, (h + 1) * P)
                logits = w.log()
                if read.key is not None and read.query is not None:
                    k, q = e @ read.key.weight[channel].T, read.query[m, h]
                    k = k / (k.square().mean(1, keepdim=True) + 1e-2).sqrt()
                    q = q / (q.square().mean() + 1e-2).sqrt()
                    logits = logits + 2 / P**0.5 * (k @ q)
                added = e @ read.value.weight[channel].T
                if read.slope is not None:
                    added = added + s[:, None] * (e @ read.slope.weight[channel].T)
                tokens.append(logits.softmax(0) @ added)
        out.append(torch.stack(tokens).view(M, H, P))
    return torch.stack(out)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("attention", [False, True])
def test_it_is_softmax_attention_cell_by_cell_and_so_are_its_gradients(values: bool, attention: bool) -> None:
    read, batch = reader(values, attention), some_cells()
    genes = torch.randn(G, E, requires_grad=True)
    value = torch.log1p(batch.counts)
    target = torch.randn(len(batch), M, H, P)
    found = []
    for function in (lambda *inputs: read(*inputs)[0], lambda *inputs: read_plain(read, *inputs)):
        y = function(genes, batch, batch.counts, value)
        found.append((y, *torch.autograd.grad((y * target).sum(), [genes, *read.parameters()])))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_a_cell_without_genes_and_one_whose_counts_were_thinned_away_read_zero() -> None:
    read, batch = reader(), some_cells()
    thinned = batch.counts.clone()
    thinned[batch.indptr[4] : batch.indptr[5]] = 0
    genes = torch.randn(G, E, requires_grad=True)
    y, *_ = read(genes, batch, thinned, thinned)
    assert (y[[2, 4]] == 0).all()
    assert (y[[0, 1, 3, 5, 6]] != 0).all()
    (gradient,) = torch.autograd.grad(y.sum(), genes)
    assert gradient.isfinite().all()


def test_the_order_in_which_genes_are_numbered_changes_nothing() -> None:
    read, batch = reader(), some_cells()
    genes, order = torch.randn(G, E), torch.randperm(G)
    place = order.argsort()
    moved = place[batch.indices.long()]
    permuted = torch.cat(
        [first + moved[first:last].argsort() for first, last in zip(batch.indptr[:-1], batch.indptr[1:], strict=True)]
    )
    other = replace(batch, indices=moved[permuted].int(), counts=batch.counts[permuted])
    torch.testing.assert_close(
        read(genes[order], other, other.counts, other.counts)[0], read(genes, batch, batch.counts, batch.counts)[0]
    )


def test_the_order_in_which_the_counts_of_a_cell_are_stored_changes_nothing() -> None:
    read, batch = reader(), some_cells()
    genes = torch.randn(G, E)
    backwards = torch.cat(
        [torch.arange(int(b) - 1, int(a) - 1, -1) for a, b in zip(batch.indptr[:-1], batch.indptr[1:], strict=True)]
    )
    other = replace(batch, indices=batch.indices[backwards], counts=batch.counts[backwards])
    torch.testing.assert_close(
        read(genes, other, other.counts, other.counts)[0], read(genes, batch, batch.counts, batch.counts)[0]
    )


def test_logits_stay_within_bounds_whatever_the_weights() -> None:
    read = reader()
    with torch.no_grad():
        for parameter in read.parameters():
            parameter.mul_(1e4)
    bound = 2 * P**0.5 + 1e-4
    assert read.weights(1e4 * torch.randn(200, E)).log().abs().max() <= bound


def test_counts_of_many_molecules_weigh_as_much_as_so_many_genes() -> None:
    """The weight is that of a multiset: a gene counted three times is three genes of the same row."""
    read = reader(values=False)
    genes = torch.randn(G, E)
    genes[3:6] = genes[3]
    apart, together = torch.zeros(1, G), torch.zeros(1, G)
    apart[0, [0, 3, 4, 5]] = 1
    together[0, [0, 3]] = torch.tensor([1.0, 3.0])
    y = [read(genes, batch, batch.counts, batch.counts)[0] for batch in (cells(apart), cells(together))]
    torch.testing.assert_close(*y)


def test_the_formula_of_its_operations_is_what_torch_counts() -> None:
    read, batch = reader().requires_grad_(False), some_cells()
    with FlopCounterMode(display=False) as counter:
        read(torch.randn(G, E), batch, batch.counts, batch.counts)
    nonzeros = len(batch.counts)
    assert counter.get_total_flops() == read.flops(G, nonzeros) - read.sparse_flops(nonzeros)
    assert read.sparse_flops(nonzeros) == 2 * nonzeros * M * H * (P + 1 + P)
