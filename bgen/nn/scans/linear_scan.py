"""The elementwise linear recurrence h_t = a_t h_{t-1} + u_t, as a plain loop and as a scan of two levels.

Axes: B sequences, T points; the points are cut into C chunks of Q points.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def scan_sequential(a_BT: Tensor, u_BT: Tensor) -> Tensor:
    """Return every state ``h``, ``[B, T, ...]``, from zero on, point by point: the reference.

    ``a_BT`` and ``u_BT`` are real or complex, ``[B, T, ...]``; trailing axes broadcast. ``a = 0`` restarts from zero.
    """
    h, states = torch.zeros_like(u_BT[:, 0]), []
    for t in range(u_BT.shape[1]):
        h = a_BT[:, t] * h + u_BT[:, t]
        states.append(h)
    return torch.stack(states, dim=1)


def scan_chunked(a_BT: Tensor, u_BT: Tensor) -> Tensor:
    """Compute :func:`scan_sequential` in about 2 sqrt(T) steps instead of T.

    All chunks run side by side from zero; then the final states are passed from chunk to chunk, and each point adds
    what reached it from before its chunk. Only products of decays are formed, never quotients, so nothing overflows.
    (Scans of logarithmic depth were measured to be slower on CPUs than the plain loop.)
    """
    T = u_BT.shape[1]
    Q = max(1, math.isqrt(T))
    if Q < 4:
        return scan_sequential(a_BT, u_BT)
    padding = -T % Q
    if padding:
        a_BT, u_BT = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding)) for t in (a_BT, u_BT))
    a_BCQ, u_BCQ = (t.unflatten(1, (-1, Q)) for t in (a_BT, u_BT))

    # unbind, not indexing: the gradient of an index is a tensor of the full size, one for every step.
    inside = torch.zeros_like(u_BCQ[:, :, 0])
    through = torch.ones_like(a_BCQ[:, :, 0])
    insides, throughs = [], []
    for a, u in zip(a_BCQ.unbind(2), u_BCQ.unbind(2), strict=True):
        inside, through = a * inside + u, a * through
        insides.append(inside)
        throughs.append(through)
    carried, entering = torch.zeros_like(u_BCQ[:, 0, 0]), []
    for last, decay in zip(inside.unbind(1), through.unbind(1), strict=True):
        entering.append(carried)
        carried = decay * carried + last
    entering_BC = torch.stack(entering, dim=1)
    h_BCQ = torch.stack(insides, dim=2) + torch.stack(throughs, dim=2) * entering_BC[:, :, None]
    return h_BCQ.flatten(1, 2)[:, :T]
