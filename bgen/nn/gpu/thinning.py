"""Binomial thinning of counts on GPUs as one operator; the plain form is in :mod:`bgen.models.vae.thinning`.

The kernel (thinning_triton.py) reads gene and count of an entry and writes the count, 12 bytes, where torch's operators
move 2,500: each of 31 steps up the distribution is 9 of them. At B = 4,096 cells of 2,000 non-zero counts that is 98 MB
and 29 us on an H100 at 3.35 TB/s, 20 us on an H200 at 4.8 TB/s, instead of 20 GB. Arithmetic asks for more: some 50
operations for the bits of an entry, and 9 for each step of the longest walk of its 512, up to 31: at most 2.7 G in all,
some 100 us on either. Never measured: no GPU has run it. It is tested through Triton's interpreter.

The normal quantiles of larger counts come from a table of all 2^23 numbers that can be drawn, 34 MB on each device.

Axes: B cells, NNZ non-zero counts.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bgen.nn import random

EXACT = 32
"""Counts up to here are thinned by the exact binomial, larger ones by its normal approximation."""


@cache
def _kernels() -> Any:
    return importlib.import_module("bgen.nn.gpu.thinning_triton")


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return 1, 1/2, 1/3 ... and the normal quantiles of all uniform numbers, float32."""
    inverses = torch.tensor([1 / (k + 1) for k in range(EXACT)], device=device)
    numbers = torch.arange(1 << 23, dtype=torch.int32, device=device)
    return inverses, torch.special.ndtri(random.unit_from_23_bits(numbers))


@torch.library.custom_op(
    "bgen::thin",
    mutates_args=(),
    schema="(Tensor indptr, Tensor indices, Tensor counts, Tensor keys, Tensor keep, int stream) -> Tensor",
)
def _thin(indptr, indices, counts, keys, keep, stream):  # type: ignore[no-untyped-def]
    lost = torch.where(keep < 1, 1 - keep, 0.5)
    none = torch.exp(torch.arange(EXACT + 1.0, device=keep.device) * torch.log1p(-lost)[:, None])
    out, own = torch.empty_like(counts), (keep.contiguous(), lost, lost / (1 - lost), none)
    given = (*own, *_tables(counts.device), out, random.stream_offset(stream))
    _kernels().thin(indptr, indices, counts, keys.contiguous(), *given)
    return out


@_thin.register_fake
def _(indptr, indices, counts, keys, keep, stream):  # type: ignore[no-untyped-def]
    return torch.empty_like(counts)


def thin(indptr: Tensor, indices: Tensor, counts: Tensor, keys: Tensor, keep: Tensor) -> Tensor:
    """Return the counts thinned, float32 ``[NNZ]``; a cell whose ``keep [B]`` is 1 keeps them as they are."""
    thinned: Tensor = _thin(indptr, indices, counts, keys, keep, int(random.Stream.THIN_COUNT))
    return thinned
