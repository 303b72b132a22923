"""Dropout whose masks come from keys: plain, and on GPUs as one operator that stores no mask.

The kernels (dropout_triton.py) read x and write the result; the backward pass does so with the gradient, and computes
the mask again. In bfloat16 that is 4 bytes for each place in each pass, where torch's operators move 66 and 6, most of
them random bits, and keep a mask of 2. At B = 4,096 and D = 1,024 both passes move 34 MB: 10 us on an H100 at
3.35 TB/s, 7 us on an H200 at 4.8 TB/s; their 84 million integer operations take about as long, beside it. A mask alone
is written with 1 byte for each place: for 4,096 cells x 20,000 genes 82 MB, 24 us and 17 us, instead of 4.5 GB. Never
measured: no GPU has run them. They are tested through Triton's interpreter.

Axes: B keys, D width.
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
    return importlib.import_module("bgen.nn.gpu.dropout_triton")


@torch.library.custom_op(
    "bgen::keep_mask", mutates_args=(), schema="(Tensor keys, int stream, int n, float keep) -> Tensor"
)
def _keep_mask(keys, stream, n, keep):  # type: ignore[no-untyped-def]
    out = torch.empty(len(keys), n, dtype=torch.int8, device=keys.device)
    _kernels().mask(keys.contiguous(), out, random.stream_offset(stream), random.keep_threshold(keep))
    return out.view(torch.bool)


@_keep_mask.register_fake
def _(keys, stream, n, keep):  # type: ignore[no-untyped-def]
    return torch.empty(len(keys), n, dtype=torch.bool, device=keys.device)


@torch.library.custom_op(
    "bgen::keyed_dropout", mutates_args=(), schema="(Tensor x, Tensor keys, int stream, float keep) -> Tensor"
)
def _keyed_dropout(x, keys, stream, keep):  # type: ignore[no-untyped-def]
    scale = float(torch.ones((), dtype=x.dtype).div_(keep))  # as rounded as that of the plain form
    out, given = torch.empty_like(x), (random.stream_offset(stream), random.keep_threshold(keep), scale)
    _kernels().dropout(x, keys.contiguous(), out, *given)
    return out


@_keyed_dropout.register_fake
def _(x, keys, stream, keep):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _keep_for_backward(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, keys, *ctx.given = inputs
    ctx.save_for_backward(keys)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _keyed_dropout(grad.contiguous(), *ctx.saved_tensors, *ctx.given), None, None, None


_keyed_dropout.register_autograd(_backward, setup_context=_keep_for_backward)


def keep_mask(keys: Tensor, stream: int, n: int, keep: float) -> Tensor:
    """See :func:`bgen.nn.random.keep_mask`, which this equals to the bit."""
    if usable(keys):
        mask: Tensor = _keep_mask(keys, int(stream), n, keep)
        return mask
    return random.keep_mask(keys, stream, n, keep)


def dropout(x: Tensor, keys: Tensor, stream: int, keep: float) -> Tensor:
    """Return ``x [B, D]`` over ``keep`` where the mask of ``keys [B]`` keeps it, and zero elsewhere."""
    if usable(x):
        dropped: Tensor = _keyed_dropout(x.contiguous(), keys, int(stream), keep)
        return dropped
    return x * random.keep_mask(keys, stream, x.shape[1], keep).to(x.dtype).div_(keep)
