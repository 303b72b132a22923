"""State-space duality (SSD), the recurrence of Mamba-2, as a plain loop and as matrix products over chunks.

    h_t = exp(log_decay_t) h_{t-1} + x_t b_t^T
    y_t = h_t c_t

Source: Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, section 6. What Mamba calls the step size is not an
argument here: the caller has put it into ``log_decay`` (as dt A) and, where its input is scaled by it, into ``x``.

Axes: B sequences, T points, H heads, P channels per head, S state size, K groups of heads that share b and c,
R = H / K heads per group; the T points are cut into C chunks of Q points.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_sequential(
    x_BTHP: Tensor,
    log_decay_BTH: Tensor,
    b_BTKS: Tensor,
    c_BTKS: Tensor,
    initial_BHPS: Tensor | None = None,
    sequence_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence point by point: the reference that :func:`ssd_chunked` and the fused kernels are held to.

    Parameters
    ----------
    x_BTHP, b_BTKS, c_BTKS
        Input, and the maps into and out of the state.
    log_decay_BTH
        Logarithm of the factor by which the state shrinks on its way from point t - 1 to t; not above 0.
    initial_BHPS
        State before the first point; default zero. It belongs to the sequence that stands first.
    sequence_BT
        Number of the sequence that each point belongs to, where several are packed one after the other: the state
        starts again from zero where the number changes.

    Returns
    -------
    ``y_BTHP`` and the state after the last point, ``[B, H, P, S]``.
    """
    B, T, H, P = x_BTHP.shape
    K, S = b_BTKS.shape[2:]
    b_BTHS, c_BTHS = (t.repeat_interleave(H // K, dim=2) for t in (b_BTKS, c_BTKS))
    h_BHPS = x_BTHP.new_zeros(B, H, P, S) if initial_BHPS is None else initial_BHPS
    y = []
    for t in range(T):
        if sequence_BT is not None and t > 0:
            h_BHPS = h_BHPS * (sequence_BT[:, t] == sequence_BT[:, t - 1])[:, None, None, None]
        h_BHPS = log_decay_BTH[:, t].exp()[..., None, None] * h_BHPS + x_BTHP[:, t, :, :, None] * b_BTHS[:, t, :, None]
        y.append((h_BHPS * c_BTHS[:, t, :, None]).sum(-1))
    return torch.stack(y, dim=1), h_BHPS


def ssd_chunked(
    x_BTHP: Tensor,
    log_decay_BTH: Tensor,
    b_BTKS: Tensor,
    c_BTKS: Tensor,
    initial_BHPS: Tensor | None = None,
    sequence_BT: Tensor | None = None,
    *,
    chunk: int = 64,
    want_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute :func:`ssd_sequential` by matrix products within chunks and a short loop over the chunks.

    Arguments are those of the reference; T need not be a multiple of ``chunk``. Everything is computed in float32, or
    in float64 if an input is, also under autocast: rounding the cumulative decays to bfloat16 was measured to move
    exponents by 0.06 over 256 points. The exponents' own rounding is about 6e-8 times the sum of ``log_decay`` over a
    chunk.

    Returns
    -------
    ``y_BTHP`` in the dtype of x, and the final state if ``want_state``: at T <= chunk it is work that nothing else
    needs.
    """
    dtype = x_BTHP.dtype
    wide = torch.promote_types(torch.promote_types(dtype, log_decay_BTH.dtype), torch.float32)
    B, T, H, P = x_BTHP.shape
    K, S = b_BTKS.shape[2:]
    R, Q = H // K, min(T, chunk)
    padding = -T % Q  # with log_decay = 0 and x = 0 the state passes through unchanged
    C = (T + padding) // Q

    def cut(t: Tensor, *inner: int) -> Tensor:
        if padding:
            t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding))
        return t.to(wide).reshape(B, C, Q, *inner)

    with torch.autocast(x_BTHP.device.type, enabled=False):
        x_BCQKRP = cut(x_BTHP, K, R, P)
        # What has decayed by e^-50 is gone, in float64 too; sums that stay small keep the digits of the short gaps that
        # follow a long one.
        total_BCKRQ = cut(log_decay_BTH.clamp_min(-50), K, R).permute(0, 1, 3, 4, 2).cumsum(-1)
        b_BCKQS, c_BCKQS = (cut(t, K, S).transpose(2, 3) for t in (b_BTKS, c_BTKS))

        # Within a chunk: y_i = sum over j <= i of (c_i . b_j) exp(total_i - total_j) x_j.
        future_QQ = torch.ones(Q, Q, dtype=torch.bool, device=x_BTHP.device).triu(1)
        run_BCQ = None
        if sequence_BT is None:
            forbidden = future_QQ
        else:
            run_BCQ = _runs(sequence_BT, padding).view(B, C, Q)
            other_BCQQ = run_BCQ[..., :, None] != run_BCQ[..., None, :]
            forbidden = (other_BCQQ | future_QQ)[:, :, None, None]
        y_NKRQP: Tensor = WithinChunks.apply(
            x_BCQKRP.reshape(B * C, Q, K, R, P).permute(0, 2, 3, 1, 4),
            total_BCKRQ.reshape(B * C, K, R, Q),
            b_BCKQS.reshape(B * C, K, Q, S),
            c_BCKQS.reshape(B * C, K, Q, S),
            torch.zeros_like(forbidden, dtype=wide).masked_fill_(forbidden, -torch.inf).view(-1, 1, 1, Q, Q),
        )
        y_BCQKRP = y_NKRQP.view(B, C, K, R, Q, P).permute(0, 1, 4, 2, 3, 5)

        state = None
        if C > 1 or initial_BHPS is not None or want_state:
            # From chunk to chunk: each adds what its points leave behind at its end to what it was given.
            end_BCKR1 = total_BCKRQ[..., -1:]
            to_end_BCKRQ = (end_BCKR1 - total_BCKRQ).exp()
            from_start_BCKRQ = total_BCKRQ.exp()
            through_BCKR = end_BCKR1[..., 0].exp()
            if run_BCQ is not None:
                last_BC = run_BCQ[..., -1]
                before_BC = torch.cat([run_BCQ[:, :1, 0], last_BC[:, :-1]], dim=1)
                to_end_BCKRQ = to_end_BCKRQ * (run_BCQ == last_BC[..., None])[:, :, None, None]
                from_start_BCKRQ = from_start_BCKRQ * (run_BCQ == before_BC[..., None])[:, :, None, None]
                through_BCKR = through_BCKR * (last_BC == before_BC)[..., None, None]
            left_BCQKRP = x_BCQKRP * to_end_BCKRQ.permute(0, 1, 4, 2, 3)[..., None]
            # [R P, Q] @ [Q, S], the first transposed in place where there is one group
            left_BCKRPS = left_BCQKRP.view(B, C, Q, K, R * P).permute(0, 1, 3, 4, 2) @ b_BCKQS
            if initial_BHPS is None:
                h_BKRPS = x_BTHP.new_zeros(B, K, R, P, S, dtype=wide)
            else:
                h_BKRPS = initial_BHPS.to(wide).view(B, K, R, P, S)
            entering = []
            # unbind, not indexing: the gradient of an index is a tensor of the full size, one for every chunk.
            for through, left in zip(through_BCKR.unbind(1), left_BCKRPS.view(B, C, K, R, P, S).unbind(1), strict=True):
                entering.append(h_BKRPS)
                h_BKRPS = through[..., None, None] * h_BKRPS + left
            state = h_BKRPS.view(B, H, P, S) if want_state else None
            entering_BCKPS = torch.stack(entering, dim=1).view(B, C, K, R * P, S)
            carried_BCKQRP = (c_BCKQS @ entering_BCKPS.transpose(-1, -2)).view(B, C, K, Q, R, P)
            from_start_BCQKR1 = from_start_BCKRQ.permute(0, 1, 4, 2, 3)[..., None]
            y_BCQKRP = torch.addcmul(y_BCQKRP, carried_BCKQRP.transpose(2, 3), from_start_BCQKR1)
        return y_BCQKRP.reshape(B, C * Q, H, P)[:, :T].to(dtype), state


def _runs(sequence_BT: Tensor, padding: int) -> Tensor:
    """Number the runs of equal values 0, 1, 2, ..., so that a value that comes back later is another sequence."""
    starts_BT = F.pad(sequence_BT.diff(dim=1) != 0, (1, 0))
    return F.pad(starts_BT, (0, padding)).cumsum(dim=1)


BLOCK = 1 << 17
"""Weights that are computed at a time on a CPU: what its nearer caches hold."""


class WithinChunks(torch.autograd.Function):
    """``y_i = sum over j of W_ij x_j``, ``W_ij = (c_i . b_j) exp(total_i - total_j)``, j over what is not barred to i.

    The weights W are what costs: they are never held as a whole on a CPU, and computed again for the gradient. That of
    ``total`` needs none of them: sum_j dW_ij W_ij = dy_i . y_i and sum_i dW_ij W_ij = x_j . dx_j.

    Axes: N chunks of all sequences.
    """

    @staticmethod
    def forward(ctx: Any, x_NKRQP: Tensor, total_NKRQ: Tensor, b_NKQS: Tensor, c_NKQS: Tensor, bar: Tensor) -> Tensor:
        """Return ``y_NKRQP``; ``bar`` is 0 or -inf, ``[1 or N, 1, 1, Q, Q]``."""
        y_NKRQP = x_NKRQP.new_empty(x_NKRQP.shape)
        for part in _blocks(x_NKRQP):
            _, weight = _weights(total_NKRQ[part], b_NKQS[part], c_NKQS[part], _part(bar, part))
            torch.matmul(weight, x_NKRQP[part].contiguous(), out=y_NKRQP[part])
        ctx.save_for_backward(x_NKRQP, total_NKRQ, b_NKQS, c_NKQS, bar, y_NKRQP)
        return y_NKRQP

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_NKRQP: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs."""
        x_NKRQP, total_NKRQ, b_NKQS, c_NKQS, bar, y_NKRQP = ctx.saved_tensors
        dx_NKRQP, dtotal_NKRQ = torch.empty_like(y_NKRQP), torch.empty_like(total_NKRQ)
        db_NKQS, dc_NKQS = torch.empty_like(b_NKQS), torch.empty_like(c_NKQS)
        for part in _blocks(x_NKRQP):
            x, dy, b, c = x_NKRQP[part].contiguous(), dy_NKRQP[part].contiguous(), b_NKQS[part], c_NKQS[part]
            decay, weight = _weights(total_NKRQ[part], b, c, _part(bar, part))
            dx = torch.matmul(weight.mT, dy, out=dx_NKRQP[part])
            torch.sub((dy * y_NKRQP[part]).sum(-1), (x * dx).sum(-1), out=dtotal_NKRQ[part])
            dcb = (dy @ x.mT).mul_(decay).sum(2)
            torch.matmul(dcb.mT, c, out=db_NKQS[part])
            torch.matmul(dcb, b, out=dc_NKQS[part])
        return dx_NKRQP, dtotal_NKRQ, db_NKQS, dc_NKQS, None


def _blocks(x_NKRQP: Tensor) -> list[slice]:
    """Cut the chunks so that the weights of a part stay in a CPU's cache."""
    N, K, R, Q, _ = x_NKRQP.shape
    step = max(1, BLOCK // (K * R * Q * Q)) if x_NKRQP.device.type == "cpu" else N
    return [slice(start, start + step) for start in range(0, N, step)]


def _part(bar: Tensor, part: slice) -> Tensor:
    return bar if len(bar) == 1 else bar[part]


def _weights(total: Tensor, b: Tensor, c: Tensor, bar: Tensor) -> tuple[Tensor, Tensor]:
    decay = (total[..., :, None] - total[..., None, :]).add_(bar).exp_()
    return decay, decay * (c @ b.mT)[:, :, None]
