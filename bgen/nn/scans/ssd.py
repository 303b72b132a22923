"""State-space duality (SSD), the recurrence of Mamba-2, as a plain loop and as matrix products over chunks.

    h_t = exp(log_decay_t) h_{t-1} + x_t b_t^T
    y_t = h_t c_t

Source: Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, section 6. Mamba's step size is not an argument here: the
caller puts it into ``log_decay`` (as dt A) and, where the input is scaled by it, into ``x``.

Axes: B sequences, T points, H heads, P channels per head, S state size, K groups of heads that share b and c,
R = H / K heads per group; the T points are cut into C chunks of Q points.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bgen.nn.precision import without_autocast
from bgen.nn.scans import ssd_cpu, ssd_torch
from bgen.nn.scans.ssd_torch import Edges


def ssd_sequential(
    x_BTHP: Tensor,
    log_decay_BTH: Tensor,
    b_BTKS: Tensor,
    c_BTKS: Tensor,
    initial_BHPS: Tensor | None = None,
    sequence_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence point by point: the reference for :func:`ssd_chunked` and the fused kernels.

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


def ssd_flops(B: int, T: int, inner: int, groups: int, state: int, chunk: int = 64) -> int:
    """Floating-point operations of :func:`ssd_chunked` without initial and final state; ``inner`` is H P.

    T counts as the whole chunks that it fills. Both halves of the weights within a chunk count, as in torch; the
    compiled loop for CPUs leaves out the empty one.
    """
    Q = min(T, chunk)
    C = -(-T // Q)
    points = B * C * Q
    return 2 * points * Q * (groups * state + inner) + (4 * points * inner * state if C > 1 else 0)


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
    ``y_BTHP`` in the dtype of x, and the final state if ``want_state`` (which costs extra work at T <= chunk).
    """
    dtype = x_BTHP.dtype
    wide = torch.promote_types(torch.promote_types(dtype, log_decay_BTH.dtype), torch.float32)
    T, P, S = x_BTHP.shape[1], x_BTHP.shape[3], b_BTKS.shape[3]
    Q = min(T, chunk)
    padding = -T % Q  # with log_decay = 0 and x = 0 the state passes through unchanged
    C = (T + padding) // Q
    steps = ssd_cpu if x_BTHP.device.type == "cpu" and wide == torch.float32 else ssd_torch

    def cut(t: Tensor, lanes: int = 1) -> Tensor:
        added = (0, -t.shape[-1] % lanes, *(0, 0) * (t.dim() - 3), 0, padding)
        return (F.pad(t, added) if any(added) else t).to(wide).unflatten(1, (C, Q)).contiguous()

    with without_autocast(x_BTHP):
        # What has decayed by e^-50 is gone, also in float64. Small sums keep the digits of short gaps after a long one.
        total_BCHQ = cut(log_decay_BTH.clamp_min(-50)).transpose(2, 3).contiguous().cumsum(-1)
        x_BCQHP, b_BCQKS, c_BCQKS = (cut(t, steps.LANES) for t in (x_BTHP, b_BTKS, c_BTKS))
        run_BCQ = None if sequence_BT is None else _runs(sequence_BT, padding).unflatten(1, (C, Q))
        initial_BHSP = None
        if initial_BHPS is not None:
            initial_BHSP = F.pad(initial_BHPS.to(wide).mT, (0, -P % steps.LANES, 0, -S % steps.LANES))
        # One chunk, and nobody asks for the state that it leaves: there is nothing to carry.
        carries = C > 1 or initial_BHPS is not None or want_state
        edges = _edges(total_BCHQ.detach(), run_BCQ) if carries else None
        first_BCQ = None if run_BCQ is None else _first(run_BCQ)
        y_BCQHP, last_BHSP = _Chunks.apply(x_BCQHP, total_BCHQ, b_BCQKS, c_BCQKS, first_BCQ, initial_BHSP, edges, steps)
        state_BHPS = last_BHSP.mT[..., :P, :S] if want_state else None
        return y_BCQHP.flatten(1, 2)[:, :T, :, :P].to(dtype), state_BHPS


def _runs(sequence_BT: Tensor, padding: int) -> Tensor:
    """Number the runs of equal values 0, 1, 2, ..., so that a value that comes back later is another sequence."""
    starts_BT = F.pad(sequence_BT.diff(dim=1) != 0, (1, 0))
    return F.pad(starts_BT, (0, padding)).cumsum(dim=1)


def _first(run_BCQ: Tensor) -> Tensor:
    """Place in its chunk of the first point whose input reaches each point."""
    starts_BCQ = F.pad(run_BCQ.diff(dim=-1) != 0, (1, 0))
    return (starts_BCQ * torch.arange(run_BCQ.shape[-1], device=run_BCQ.device)).cummax(dim=-1).values


def _edges(total_BCHQ: Tensor, run_BCQ: Tensor | None) -> Edges:
    end_BCH1 = total_BCHQ[..., -1:]
    to_end, from_start, through = (end_BCH1 - total_BCHQ).exp(), total_BCHQ.exp(), end_BCH1[..., 0].exp()
    if run_BCQ is not None:
        last_BC = run_BCQ[..., -1]
        before_BC = torch.cat([run_BCQ[:, :1, 0], last_BC[:, :-1]], dim=1)
        to_end = to_end * (run_BCQ == last_BC[..., None])[:, :, None]
        from_start = from_start * (run_BCQ == before_BC[..., None])[:, :, None]
        through = through * (last_BC == before_BC)[..., None]
    return Edges(to_end, from_start, through)


class _Chunks(torch.autograd.Function):
    """The chunked scan and its gradient.

    Within a chunk ``y_i = sum over j <= i of W_ij x_j``, ``W_ij = (c_i . b_j) exp(total_i - total_j)``; from chunk to
    chunk goes the state. The weights W are not kept, but computed again for the gradient. The gradient of ``total_i``
    is what arrives at point i (row i of ``W dW``, and what the state brings) less what leaves it (column i, and what it
    adds to the state). The last point of a chunk also has the gradient of the state that leaves the chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BCQHP: Tensor,
        total_BCHQ: Tensor,
        b_BCQKS: Tensor,
        c_BCQKS: Tensor,
        first_BCQ: Tensor | None,
        initial_BHSP: Tensor | None,
        edges: Edges | None,
        steps: ModuleType,
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``y_BCQHP`` and the state after the last chunk, where ``edges`` say what goes from chunk to chunk."""
        y_BCQHP, states = steps.forward(x_BCQHP, total_BCHQ, b_BCQKS, c_BCQKS, first_BCQ, initial_BHSP, edges)
        ctx.save_for_backward(x_BCQHP, total_BCHQ, b_BCQKS, c_BCQKS, first_BCQ, states)
        ctx.edges, ctx.steps = edges, steps
        return y_BCQHP, None if states is None else states[:, -1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_BCQHP: Tensor, dlast_BHSP: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs."""
        x_BCQHP, total_BCHQ, b_BCQKS, c_BCQKS, first_BCQ, states = ctx.saved_tensors
        dx, dtotal, db, dc, dinitial = ctx.steps.backward(
            x_BCQHP,
            total_BCHQ,
            b_BCQKS,
            c_BCQKS,
            first_BCQ,
            ctx.edges,
            states,
            dy_BCQHP.contiguous(),
            dlast_BHSP,
        )
        return dx, dtotal, db, dc, None, dinitial if ctx.needs_input_grad[5] else None, None, None
