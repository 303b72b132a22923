"""State-space duality (SSD), the recurrence of Mamba-2, as a plain loop and as matrix products over chunks.

    h_t = exp(log_decay_t) h_{t-1} + x_t b_t^T
    y_t = h_t c_t

Source: Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, section 6. What Mamba calls the step size is not an
argument here: the caller has put it into ``log_decay`` (as dt A) and, where its input is scaled by it, into ``x``.

Axes: B sequences, T points, H heads, P channels per head, S state size, K groups of heads that share b and c,
R = H / K heads per group; the T points are cut into C chunks of Q points.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bgen.nn.ssd_parts import Workspace, difference, join


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
        # What has decayed by e^-50 is gone, in float64 too; sums that stay small keep the digits of the short gaps that
        # follow a long one.
        total_BCKRQ = cut(log_decay_BTH.clamp_min(-50), K, R).permute(0, 1, 3, 4, 2).contiguous().cumsum(-1)
        x_BCQKRP = cut(x_BTHP, K, R, P).contiguous()
        b_BCKQS, c_BCKQS = (cut(t, K, S).transpose(2, 3).contiguous() for t in (b_BTKS, c_BTKS))
        run_BCQ = None if sequence_BT is None else _runs(sequence_BT, padding).view(B, C, Q)
        initial_BKSRP = None
        if initial_BHPS is not None:
            initial_BKSRP = initial_BHPS.to(wide).view(B, K, R, P, S).permute(0, 1, 4, 2, 3)
        first_BCQ = None if run_BCQ is None else _first(run_BCQ)
        if C == 1 and initial_BHPS is None and not want_state:
            # No state goes from chunk to chunk: as if all were chunks of one sequence.
            given = (
                None if t is None else t.transpose(0, 1) for t in (x_BCQKRP, total_BCKRQ, b_BCKQS, c_BCKQS, first_BCQ)
            )
            y_BCQKRP, state = _Chunks.apply(*given, None, None)[0].transpose(0, 1), None
        else:
            edges = _edges(total_BCKRQ.detach(), run_BCQ)
            y_BCQKRP, last_BKSRP = _Chunks.apply(
                x_BCQKRP, total_BCKRQ, b_BCKQS, c_BCKQS, first_BCQ, initial_BKSRP, edges
            )
            state = last_BKSRP.permute(0, 1, 3, 4, 2).reshape(B, H, P, S) if want_state else None
        return y_BCQKRP.reshape(B, C * Q, H, P)[:, :T].to(dtype), state


def _runs(sequence_BT: Tensor, padding: int) -> Tensor:
    """Number the runs of equal values 0, 1, 2, ..., so that a value that comes back later is another sequence."""
    starts_BT = F.pad(sequence_BT.diff(dim=1) != 0, (1, 0))
    return F.pad(starts_BT, (0, padding)).cumsum(dim=1)


def _first(run_BCQ: Tensor) -> Tensor:
    """Place in its chunk of the first point whose input reaches each point."""
    starts_BCQ = F.pad(run_BCQ.diff(dim=-1) != 0, (1, 0))
    return (starts_BCQ * torch.arange(run_BCQ.shape[-1], device=run_BCQ.device)).cummax(dim=-1).values


class _Edges(NamedTuple):
    """What the state keeps: of a point until its chunk ends, until a point since its chunk began, through a chunk."""

    to_end_BCQKR: Tensor
    from_start_BCQKR: Tensor
    through_BCK1R1: Tensor


def _edges(total_BCKRQ: Tensor, run_BCQ: Tensor | None) -> _Edges:
    end_BCKR1 = total_BCKRQ[..., -1:]
    to_end, from_start, through = (end_BCKR1 - total_BCKRQ).exp(), total_BCKRQ.exp(), end_BCKR1[..., 0].exp()
    if run_BCQ is not None:
        last_BC = run_BCQ[..., -1]
        before_BC = torch.cat([run_BCQ[:, :1, 0], last_BC[:, :-1]], dim=1)
        to_end = to_end * (run_BCQ == last_BC[..., None])[:, :, None, None]
        from_start = from_start * (run_BCQ == before_BC[..., None])[:, :, None, None]
        through = through * (last_BC == before_BC)[..., None, None]
    to_end, from_start = (t.permute(0, 1, 4, 2, 3).contiguous() for t in (to_end, from_start))
    return _Edges(to_end, from_start, through[:, :, :, None, :, None])


class _Chunks(torch.autograd.Function):
    """The chunked scan and its gradient, both a few chunks at a time, so that on a CPU they stay in its caches.

    Within a chunk ``y_i = sum over j <= i of W_ij x_j``, ``W_ij = (c_i . b_j) exp(total_i - total_j)``; from chunk to
    chunk goes the state. The weights W are never held as a whole on a CPU, and computed again for the gradient. That of
    ``total`` needs none of them: where total_i stands it multiplies a part of y_i, and where -total_j stands a part of
    what x_j does: it is ``dy_i . y_i - x_i . dx_i``, and at the end of a chunk what the state that leaves it does too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BCQKRP: Tensor,
        total_BCKRQ: Tensor,
        b_BCKQS: Tensor,
        c_BCKQS: Tensor,
        first_BCQ: Tensor | None,
        initial_BKSRP: Tensor | None,
        edges: _Edges | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``y_BCQKRP`` and the state after the last chunk, where ``edges`` say what goes from chunk to chunk."""
        (B, C, _, K, R, P), S = x_BCQKRP.shape, b_BCKQS.shape[-1]
        y_BCQKRP = torch.empty_like(x_BCQKRP)
        work = Workspace(x_BCQKRP)
        states = None
        if edges is not None:
            states = x_BCQKRP.new_empty(B, C + 1, K, S, R, P)  # before the first chunk, and after each
            states[:, 0] = 0 if initial_BKSRP is None else initial_BKSRP
        for at in work.blocks():
            x, total, b, c, first, y = at.cut(x_BCQKRP, total_BCKRQ, b_BCKQS, c_BCKQS, first_BCQ, y_BCQKRP)
            within = work.product(work.weights(total, c @ b.mT, first), work.by_head(x))
            if states is None or edges is None:
                join(within, None, y)
                continue
            # Each chunk adds what its points leave behind at its end to what it was given.
            to_end, from_start = at.cut(edges.to_end_BCQKR, edges.from_start_BCQKR)
            left = b.mT @ (x * to_end[..., None]).flatten(3).transpose(1, 2)
            leaving = states[at.sequences, at.first + 1 : at.end + 1]
            leaving.copy_(left.view_as(leaving))
            for chunk in range(at.first, at.end):
                through = edges.through_BCK1R1[at.sequences, chunk]
                states[at.sequences, chunk + 1].addcmul_(states[at.sequences, chunk], through)
            join(within, (c @ at.cut(states)[0].flatten(3), from_start), y)
        ctx.save_for_backward(x_BCQKRP, total_BCKRQ, b_BCKQS, c_BCKQS, first_BCQ, y_BCQKRP, states)
        ctx.edges = edges
        return y_BCQKRP, None if states is None else states[:, -1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_BCQKRP: Tensor, dlast_BKSRP: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs."""
        x_BCQKRP, total_BCKRQ, b_BCKQS, c_BCKQS, first_BCQ, y_BCQKRP, states = ctx.saved_tensors
        edges, dy_BCQKRP = ctx.edges, dy_BCQKRP.contiguous()
        inputs = x_BCQKRP, total_BCKRQ, b_BCKQS, c_BCKQS
        gradients = tuple(torch.empty_like(t) for t in inputs)
        work = Workspace(x_BCQKRP)
        dstate_BKSRP = None if dlast_BKSRP is None else dlast_BKSRP.clone()
        for at in reversed(work.blocks()):
            x, total, b, c, first, y, dy = at.cut(*inputs, first_BCQ, y_BCQKRP, dy_BCQKRP)
            dx, dtotal, db, dc = at.cut(*gradients)
            weight, dy_by_head = work.weights(total, c @ b.mT, first), work.by_head(dy)
            dx_within = work.product(weight.mT, dy_by_head)
            dcb = work.decayed_sum(total, dy_by_head, work.by_head(x, 1), first)
            torch.matmul(dcb.mT, c, out=db)
            torch.matmul(dcb, b, out=dc)
            if edges is None or dstate_BKSRP is None:
                join(dx_within, None, dx)
                difference(dy, y, x, dx, dtotal)
                continue
            to_end, from_start, entering = at.cut(edges.to_end_BCQKR, edges.from_start_BCQKR, states)
            dcarried = (dy * from_start[..., None]).flatten(3).transpose(1, 2)
            dc += dcarried @ entering.flatten(3).mT
            leaving = states[at.sequences, at.first + 1 : at.end + 1]
            dentering = (c.mT @ dcarried).view_as(leaving)
            dleaving = torch.empty_like(leaving)
            dstate = dstate_BKSRP[at.sequences]
            for chunk in reversed(range(at.end - at.first)):
                dleaving[:, chunk] = dstate
                through = edges.through_BCK1R1[at.sequences, at.first + chunk]
                torch.addcmul(dentering[:, chunk], dleaving[:, chunk], through, out=dstate)
            later = dleaving.flatten(0, 1).flatten(3)
            db += (x * to_end[..., None]).flatten(3).transpose(1, 2) @ later.mT
            join(dx_within, (b @ later, to_end), dx)
            difference(dy, y, x, dx, dtotal)
            dtotal[..., -1] += (dleaving * leaving).sum((3, 5)).flatten(0, 1)
        dinitial = dstate_BKSRP if ctx.needs_input_grad[5] else None
        return *gradients, None, dinitial, None
