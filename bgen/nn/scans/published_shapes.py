"""What mamba2's published kernels give, without values: for tensors without memory (meta), which stand for a GPU's.

So a plan of a run follows what a GPU would do, where mamba-ssm is not installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ARGUMENTS = "Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c"


@torch.library.custom_op("bgen::published_ssd", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def _ssd(x, dt, a, b, c):  # type: ignore[no-untyped-def]
    raise NotImplementedError("mamba-ssm's kernels stand behind it only in shape")


@_ssd.register_fake
def _(x, dt, a, b, c):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.custom_op(
    "bgen::published_ssd_gradient",
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _gradient(grad, x, dt, a, b, c):  # type: ignore[no-untyped-def]
    raise NotImplementedError("mamba-ssm's kernels stand behind it only in shape")


@_gradient.register_fake
def _(grad, x, dt, a, b, c):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t) for t in (x, dt, a, b, c))


def _keep(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _gradient(grad.contiguous(), *ctx.saved_tensors)
    return found


_ssd.register_autograd(_backward, setup_context=_keep)


def ssd_in_shape(x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTKS: Tensor, c_BTKS: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`bgen.nn.scans.published_kernels.ssd_fused`."""
    B, _, H, P = x_BTHP.shape
    return _ssd(x_BTHP, dt_BTH, a_H, b_BTKS, c_BTKS), x_BTHP.new_empty(B, H, P, b_BTKS.shape[-1])
