"""The steps of the chunked SSD around its matrix products: compiled on a CPU in float32, in torch elsewhere.

Axes: N chunks that are computed at a time, K groups, R heads per group, Q points of a chunk, P channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bgen.nn import ssd_cpu
from bgen.nn.threads import parts

BLOCK = 1 << 17
"""Weights that are computed at a time on a CPU: what its nearer caches hold."""


class Block(NamedTuple):
    """Chunks that are computed at a time: some of one sequence on a CPU, all of all elsewhere."""

    sequences: slice
    first: int
    end: int

    def cut(self, *tensors: Any) -> list[Any]:
        """Return this block of each ``[B, C, ...]`` as a view ``[N, ...]``; of None, None."""
        chunks = slice(self.first, self.end)
        return [None if t is None else t[self.sequences, chunks].flatten(0, 1) for t in tensors]


class Workspace:
    """How many chunks are computed at a time, and the memory for what is made of them, used again for the next."""

    def __init__(self, x_BCQKRP: Tensor) -> None:
        self.sequences, self.chunks, Q, K, R, P = x_BCQKRP.shape
        self.compiled = _compiled(x_BCQKRP)
        cpu = x_BCQKRP.device.type == "cpu"
        self.together = 1 if cpu else self.sequences
        self.step = min(self.chunks, max(1, BLOCK // (K * R * Q * Q))) if cpu else self.chunks
        n = self.together * self.step
        self._weight = x_BCQKRP.new_zeros(n, K, R, Q, Q)
        self._values = x_BCQKRP.new_empty(n, K, R, Q, Q)
        self._by_head, self._product = x_BCQKRP.new_empty(2, n, K, R, Q, P), x_BCQKRP.new_empty(n, K, R, Q, P)

    def blocks(self) -> list[Block]:
        """What to compute one after the other; a sequence from its first chunk to its last."""
        return [
            Block(slice(b, b + self.together), begin, min(begin + self.step, self.chunks))
            for b in range(0, self.sequences, self.together)
            for begin in range(0, self.chunks, self.step)
        ]

    def by_head(self, t_NQKRP: Tensor, place: int = 0) -> Tensor:
        """Return ``[N, K, R, Q, P]``, in one of two places."""
        return self._by_head[place, : len(t_NQKRP)].copy_(t_NQKRP.permute(0, 2, 3, 1, 4))

    def product(self, weight_NKRQQ: Tensor, by_head_NKRQP: Tensor) -> Tensor:
        """Return the matrix product ``[N, K, R, Q, P]``."""
        return torch.matmul(weight_NKRQQ, by_head_NKRQP, out=self._product[: len(weight_NKRQQ)])

    def weights(self, total_NKRQ: Tensor, cb_NKQQ: Tensor, first_NQ: Tensor | None) -> Tensor:
        """Return ``cb_ij exp(total_i - total_j)``, ``[N, K, R, Q, Q]``, for j from first_i to i."""
        weight = self._weight[: len(total_NKRQ)]
        if not self.compiled:
            return torch.mul(_decay(total_NKRQ, first_NQ), cb_NKQQ[:, :, None], out=weight)
        threads = parts(total_NKRQ.shape[:3].numel(), weight.numel())
        first = _first_or_zero(total_NKRQ, first_NQ)
        ssd_cpu.weights(total_NKRQ.detach().numpy(), cb_NKQQ.numpy(), first.numpy(), threads, weight.numpy())
        return weight

    def decayed_sum(self, total_NKRQ: Tensor, dy_NKRQP: Tensor, x_NKRQP: Tensor, first_NQ: Tensor | None) -> Tensor:
        """Return the sum over a group's heads of ``(dy_i . x_j) exp(total_i - total_j)``, ``[N, K, Q, Q]``."""
        N, K, _, Q = total_NKRQ.shape
        values = torch.matmul(dy_NKRQP, x_NKRQP.mT, out=self._values[:N])
        if not self.compiled:
            return values.mul_(_decay(total_NKRQ, first_NQ)).sum(2)
        out = values.new_empty(N, K, Q, Q)
        threads = parts(N * K * Q, values.numel())
        first = _first_or_zero(total_NKRQ, first_NQ)
        ssd_cpu.decayed_sum(total_NKRQ.numpy(), values.numpy(), first.numpy(), threads, out.numpy())
        return out


def join(within_NKRQP: Tensor, carried: tuple[Tensor, Tensor] | None, out_NQKRP: Tensor) -> None:
    """Write ``within``, plus what is ``carried [N, K, Q, R P]`` times its factor ``[N, Q, K, R]``."""
    N, Q, K, R, P = out_NQKRP.shape
    if carried is None:
        out_NQKRP.copy_(within_NKRQP.permute(0, 3, 1, 2, 4))
        return
    carried_NKQRP, factor_NQKR = carried[0].view(N, K, Q, R, P), carried[1]
    if _compiled(out_NQKRP):
        given = (t.numpy() for t in (within_NKRQP, carried_NKQRP, factor_NQKR))
        ssd_cpu.join(*given, parts(N * Q, out_NQKRP.numel()), out_NQKRP.numpy())
    else:
        out_NQKRP.copy_(within_NKRQP.permute(0, 3, 1, 2, 4))
        out_NQKRP.addcmul_(carried_NKQRP.transpose(1, 2), factor_NQKR[..., None])


def difference(dy: Tensor, y: Tensor, x: Tensor, dx: Tensor, out_NKRQ: Tensor) -> None:
    """Write the sum over the channels of ``dy * y - x * dx``, all ``[N, Q, K, R, P]``."""
    if _compiled(x):
        threads = parts(x.shape[:2].numel(), x.numel())
        ssd_cpu.difference(dy.numpy(), y.numpy(), x.detach().numpy(), dx.numpy(), threads, out_NKRQ.numpy())
    else:
        out_NKRQ.copy_(((dy * y).sum(-1) - (x * dx).sum(-1)).permute(0, 2, 3, 1))


def _compiled(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.dtype == torch.float32


def _first_or_zero(total_NKRQ: Tensor, first_NQ: Tensor | None) -> Tensor:
    return torch.zeros(1, total_NKRQ.shape[-1], dtype=torch.int64) if first_NQ is None else first_NQ


def _decay(total: Tensor, first: Tensor | None) -> Tensor:
    j = torch.arange(total.shape[-1], device=total.device)
    barred = j > j[:, None]
    if first is not None:
        barred = (barred | (j < first[..., None]))[:, None, None]
    return (total[..., :, None] - total[..., None, :]).masked_fill_(barred, -torch.inf).exp_()
