"""What mamba2's published kernels give, without values: for tensors without memory (meta), which stand for a GPU's.

So a plan of a run follows what a GPU would do, where mamba-ssm is not installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ARGUMENTS = "Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c"

torch.library.define("bgen::published_ssd", f"({_ARGUMENTS}) -> Tensor")
torch.library.define(
    "bgen::published_ssd_gradient", f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("bgen::published_ssd")
def _(x, dt, a, b, c):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.register_fake("bgen::published_ssd_gradient")
def _(grad, x, dt, a, b, c):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t) for t in (x, dt, a, b, c))


def _keep(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = torch.ops.bgen.published_ssd_gradient(grad.contiguous(), *ctx.saved_tensors)
    return found


torch.library.register_autograd("bgen::published_ssd", _backward, setup_context=_keep)


def ssd_in_shape(x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTKS: Tensor, c_BTKS: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`bgen.nn.scans.published_kernels.ssd_fused`."""
    B, _, H, P = x_BTHP.shape
    out: Tensor = torch.ops.bgen.published_ssd(x_BTHP, dt_BTH, a_H, b_BTKS, c_BTKS)
    return out, x_BTHP.new_empty(B, H, P, b_BTKS.shape[-1])
