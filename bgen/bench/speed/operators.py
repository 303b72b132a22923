"""What the GPU's operators compute, beside the plain forms in float64 on the CPU; for ``bgen bench gpu``.

Axes: B cells, G genes, H width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bgen.data.batch import CellBatch
from bgen.models.vae.set_read import SetRead
from bgen.models.vae.sparse_linear import densify, log_normalise, log_normalised_matmul
from bgen.models.vae.thinning import thin, thin_plainly
from bgen.nn.gpu.dropout import dropout
from bgen.nn.random import Stream, keep_mask

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Pair:
    """Values of an operator and those expected; tensors with gradients, mine and the exact ones."""

    what: str
    precision: str
    values: tuple[Tensor, Tensor]
    gradients: list[tuple[Tensor, Tensor]]


def compare_dropout(device: torch.device, cells: int, width: int) -> Iterator[Pair]:
    """Keyed dropout; a mask that differs in one place is a large difference."""
    keys = torch.arange(cells) * 7919 - 1000
    mask = keep_mask(keys, Stream.DROPOUT, width, 0.9)
    for precision, dtype in PRECISIONS.items():
        x, weight = (t.to(dtype) for t in torch.randn(2, cells, width, generator=torch.Generator().manual_seed(0)))
        exact = x.double().requires_grad_()
        here = x.to(device, copy=True).requires_grad_()
        expected, values = exact * mask / 0.9, dropout(here, keys.to(device), Stream.DROPOUT, 0.9)
        expected.backward(weight.double())
        values.backward(weight.to(device))
        yield Pair("keyed dropout", precision, (values, expected), [(here, exact)])


def compare_thinning(device: torch.device, batch: CellBatch) -> Iterator[Pair]:
    """Thinning of half of the cells, against the plain form on the same device; there are no gradients."""
    here = batch.to(device)
    yield Pair("thinning", "float32", (thin(here, 0.5), thin_plainly(here, 0.5)), [])


def compare_first_layer(device: torch.device, batch: CellBatch, width: int) -> Iterator[Pair]:
    """The encoder's first layer, from counts, against the dense product."""
    g = torch.Generator().manual_seed(0)
    values = log_normalise(batch, batch.counts.double(), 1e4)
    dense = densify(batch.rows, batch.indices, values, (len(batch), batch.n_genes))
    for precision, dtype in PRECISIONS.items():
        weight, grad = (torch.randn(n, width, generator=g).to(dtype) for n in (batch.n_genes, len(batch)))
        exact = weight.double().requires_grad_()
        here = weight.to(device, copy=True).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            found = log_normalised_matmul(here, on := batch.to(device), on.counts, 1e4)
        expected = dense @ exact
        expected.backward(grad.double())
        found.backward(grad.to(device))
        yield Pair("first layer", precision, (found, expected), [(here, exact)])


def compare_set_read(device: torch.device, batch: CellBatch, width: int) -> Iterator[Pair]:
    """What tokens read of the cells' genes, by the rows of a table of genes, whose gradients are compared."""
    torch.manual_seed(0)
    read, rows = SetRead(16, 4, width, 2, values=True, attention=True), torch.randn(batch.n_genes, 16)
    values = log_normalise(batch, batch.counts, 1e4)
    exact = rows.double().requires_grad_()
    expected = copy.deepcopy(read).double()(exact, batch, values.double(), values.double())[0]
    expected.square().sum().backward()
    for precision in PRECISIONS:
        here, log = rows.to(device, copy=True).requires_grad_(), values.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            found = copy.deepcopy(read).to(device)(here, batch.to(device), log, log)[0]
        found.square().sum().backward()
        yield Pair("set read", precision, (found, expected), [(here, exact)])
