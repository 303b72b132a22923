"""The chunked SSD and its gradient in torch: on a GPU, and in float64.

Axes: B sequences, C chunks, Q points of a chunk, H heads, K groups, R = H / K heads per group, P channels, S state
size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LANES = 1
"""P and S are multiples of it."""


class Edges(NamedTuple):
    """Decay from a point to the end of its chunk, from the start of its chunk to a point, and through a chunk."""

    to_end_BCHQ: Tensor
    from_start_BCHQ: Tensor
    through_BCH: Tensor


def forward(
    x_BCQHP: Tensor,
    total_BCHQ: Tensor,
    b_BCQKS: Tensor,
    c_BCQKS: Tensor,
    first_BCQ: Tensor | None,
    initial_BHSP: Tensor | None,
    edges: Edges | None,
) -> tuple[Tensor, Tensor | None]:
    """Return ``y_BCQHP`` and the states before the first chunk and after each, ``[B, 1 + C, H, S, P]``."""
    groups = b_BCQKS.shape[3]
    x_BCKRQP, b_BCK1QS, c_BCK1QS = _by_head(x_BCQHP, groups), _by_group(b_BCQKS), _by_group(c_BCQKS)
    decay_BCKRQQ = _decay(total_BCHQ.unflatten(2, (groups, -1)), first_BCQ)
    y_BCKRQP = (decay_BCKRQQ * (c_BCK1QS @ b_BCK1QS.mT)) @ x_BCKRQP
    if edges is None:
        return _by_point(y_BCKRQP), None
    to_end, from_start = (t.unflatten(2, (groups, -1))[..., None] for t in (edges.to_end_BCHQ, edges.from_start_BCHQ))
    left_BCHSP = (b_BCK1QS.mT @ (x_BCKRQP * to_end)).flatten(2, 3)
    B, C, H, S, P = left_BCHSP.shape
    states = x_BCQHP.new_empty(B, 1 + C, H, S, P)
    states[:, 0] = 0 if initial_BHSP is None else initial_BHSP
    for chunk in range(C):
        through = edges.through_BCH[:, chunk, :, None, None]
        torch.addcmul(left_BCHSP[:, chunk], states[:, chunk], through, out=states[:, chunk + 1])
    y_BCKRQP.addcmul_(c_BCK1QS @ states[:, :-1].unflatten(2, (groups, -1)), from_start)
    return _by_point(y_BCKRQP), states


def backward(
    x_BCQHP: Tensor,
    total_BCHQ: Tensor,
    b_BCQKS: Tensor,
    c_BCQKS: Tensor,
    first_BCQ: Tensor | None,
    edges: Edges | None,
    states: Tensor | None,
    dy_BCQHP: Tensor,
    dlast_BHSP: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of ``x``, ``total``, ``b``, ``c`` and the initial state."""
    groups = b_BCQKS.shape[3]
    x_BCKRQP, dy_BCKRQP = _by_head(x_BCQHP, groups), _by_head(dy_BCQHP, groups)
    b_BCK1QS, c_BCK1QS = _by_group(b_BCQKS), _by_group(c_BCQKS)
    decay_BCKRQQ = _decay(total_BCHQ.unflatten(2, (groups, -1)), first_BCQ)
    cb_BCK1QQ = c_BCK1QS @ b_BCK1QS.mT
    ddecay_BCKRQQ = (dy_BCKRQP @ x_BCKRQP.mT).mul_(decay_BCKRQQ)
    dcb_BCK1QQ = ddecay_BCKRQQ.sum(3, keepdim=True)
    ddecay_BCKRQQ.mul_(cb_BCK1QQ)
    dtotal_BCKRQ = ddecay_BCKRQQ.sum(-1) - ddecay_BCKRQQ.sum(-2)
    dx_BCKRQP = decay_BCKRQQ.mul_(cb_BCK1QQ).mT @ dy_BCKRQP
    db_BCK1QS, dc_BCK1QS = dcb_BCK1QQ.mT @ c_BCK1QS, dcb_BCK1QQ @ b_BCK1QS
    dstate_BHSP = None
    if edges is not None and states is not None and dlast_BHSP is not None:
        to_end, from_start = (
            t.unflatten(2, (groups, -1))[..., None] for t in (edges.to_end_BCHQ, edges.from_start_BCHQ)
        )
        kept_BCKRQP, dstate_BHSP = dy_BCKRQP * from_start, dlast_BHSP
        dentering_BCHSP = (c_BCK1QS.mT @ kept_BCKRQP).flatten(2, 3)
        dleaving_BCHSP = torch.empty_like(dentering_BCHSP)
        for chunk in reversed(range(x_BCQHP.shape[1])):
            dleaving_BCHSP[:, chunk] = dstate_BHSP
            through = edges.through_BCH[:, chunk, :, None, None]
            dstate_BHSP = torch.addcmul(dentering_BCHSP[:, chunk], dstate_BHSP, through)
        later_BCKRSP = dleaving_BCHSP.unflatten(2, (groups, -1))
        dc_BCKRQS = kept_BCKRQP @ states[:, :-1].unflatten(2, (groups, -1)).mT
        db_BCKRQS = (x_BCKRQP * to_end) @ later_BCKRSP.mT
        dtotal_BCKRQ += (dc_BCKRQS * c_BCK1QS).sum(-1) - (db_BCKRQS * b_BCK1QS).sum(-1)
        dc_BCK1QS += dc_BCKRQS.sum(3, keepdim=True)
        db_BCK1QS += db_BCKRQS.sum(3, keepdim=True)
        dx_BCKRQP.addcmul_(b_BCK1QS @ later_BCKRSP, to_end)
        dtotal_BCKRQ[..., -1] += (dleaving_BCHSP * states[:, 1:]).sum((3, 4)).unflatten(2, (groups, -1))
    db_BCQKS, dc_BCQKS = (t[:, :, :, 0].transpose(2, 3) for t in (db_BCK1QS, dc_BCK1QS))
    return _by_point(dx_BCKRQP), dtotal_BCKRQ.flatten(2, 3), db_BCQKS, dc_BCQKS, dstate_BHSP


def _by_head(t_BCQHP: Tensor, groups: int) -> Tensor:
    return t_BCQHP.transpose(2, 3).unflatten(2, (groups, -1))


def _by_point(t_BCKRQP: Tensor) -> Tensor:
    return t_BCKRQP.flatten(2, 3).transpose(2, 3)


def _by_group(t_BCQKS: Tensor) -> Tensor:
    return t_BCQKS.transpose(2, 3)[:, :, :, None]


def _decay(total_BCKRQ: Tensor, first_BCQ: Tensor | None) -> Tensor:
    """``exp(total_i - total_j)`` for j from first_i to i, 0 for others."""
    j = torch.arange(total_BCKRQ.shape[-1], device=total_BCKRQ.device)
    barred = j > j[:, None]
    if first_BCQ is not None:
        barred = (barred | (j < first_BCQ[..., None]))[:, :, None, None]
    return (total_BCKRQ[..., :, None] - total_BCKRQ[..., None, :]).masked_fill_(barred, -torch.inf).exp_()
