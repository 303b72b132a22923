"""Keyed draws, uniform and normal: plain, and on GPUs as one operator each.

torch's operators are some forty kernels for a draw, which at a few numbers a cell cost nothing but their launches: 104
of a step of a VAE. The kernel (draws_triton.py) writes 4 bytes a number and reads 8 a key. Never measured: no GPU has
run it. It is tested through Triton's interpreter.

Axes: B keys.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bgen.nn import random
from bgen.nn.gpu.kernels import usable


@cache
def _kernels() -> Any:
    return importlib.import_module("bgen.nn.gpu.draws_triton")


@torch.library.custom_op(
    "bgen::draw", mutates_args=(), schema="(Tensor keys, int stream, SymInt n, bool normal) -> Tensor"
)
def _draw(keys, stream, n, normal):  # type: ignore[no-untyped-def]
    out = torch.empty(len(keys), n, dtype=torch.float32, device=keys.device)
    _kernels().draw(keys.contiguous(), out, random.stream_offset(stream), normal)
    return out


@_draw.register_fake
def _(keys, stream, n, normal):  # type: ignore[no-untyped-def]
    return torch.empty(len(keys), n, dtype=torch.float32, device=keys.device)


def uniform(keys: Tensor, stream: int, n: int) -> Tensor:
    """See :func:`bgen.nn.random.uniform`, which this equals to the bit."""
    if usable(keys):
        drawn: Tensor = _draw(keys, int(stream), n, False)
        return drawn
    return random.uniform(keys, stream, n)


def normal(keys: Tensor, stream: int, n: int) -> Tensor:
    """See :func:`bgen.nn.random.normal`; logarithm and cosine are Triton's."""
    if usable(keys):
        drawn: Tensor = _draw(keys, int(stream), n, True)
        return drawn
    return random.normal(keys, stream, n)
