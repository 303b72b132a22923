"""What the GPU's operators compute, beside the plain forms in float64 on the CPU; for ``bgen bench gpu``.

Axes: B cells, G genes, H width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bgen.data.batch import CellBatch
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
