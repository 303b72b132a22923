"""Negative-binomial log-likelihood of sparse counts under a softmax decoder, with its gradient in few dense passes.

With ``rho = softmax(logits)``, ``mu = library * rho``, ``r = mu / theta`` and ``L = log(1 + r)``, the log-probability
of a count ``x`` is

    log p(x) = -theta * L  +  [ x * (log mu - L) + A(x, theta) - log x! ],
    A(x, theta) = log Gamma(theta + x) - log Gamma(theta) - x * log theta.

The first term is the log-probability of a zero; it needs no log-gamma, and its sum over genes is one matrix-vector
product. The bracket is zero for ``x = 0``, so it is evaluated at the non-zeros only (about one entry in ten). ``A``
vanishes as theta grows. It is computed by Stirling's series after the recurrence ``Gamma(y) = Gamma(y + 4) / (y (y+1)
(y+2) (y+3))``, in a form that does not subtract large numbers. torch's float32 lgamma would lose all digits of the
difference from theta = 1e4 on, and its digamma is five times slower on a CPU.

On a CPU in float32 the passes are compiled ones (:mod:`bgen.models.likelihoods.sparse_cpu`); elsewhere they are
torch's.

Axes: B cells, G genes, NNZ non-zero counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bgen.data.batch import CellBatch
from bgen.models.likelihoods import sparse_cpu
from bgen.nn.cpu.threads import parts

_SHIFT = 4


def nonzero_term(x: Tensor, log_mu: Tensor, log1p_ratio: Tensor, theta: Tensor) -> Tensor:
    """The bracket of the module's formula, elementwise over the non-zeros; differentiable by autograd."""
    return x * (log_mu - log1p_ratio) + _count_term(x, theta)


def _count_term(x: Tensor, theta: Tensor) -> Tensor:
    """``A(x, theta) - log x!``, elementwise; zero for a count of one.

    A is all but the last term: Stirling's formula for Gamma at ``high = theta + 4 + x`` over that at
    ``low = theta + 4``, less ``x log theta``, and the four factors of the recurrence.
    """
    low = theta + _SHIFT
    high = low + x
    product = torch.ones_like(x)
    for k in range(_SHIFT):
        product = product * (1 + x / (theta + k))
    return (
        ((low - 0.5) * torch.log1p(x / low) - x)
        + x * torch.log(high / theta)
        + (_stirling(high) - _stirling(low) - torch.log(product))
        - torch.lgamma(x + 1)
    )


def _stirling(y: Tensor) -> Tensor:
    """The rest of Stirling's formula for log Gamma(y), with an error of 4e-8 for y >= 4."""
    inverse = 1 / y
    square = inverse * inverse
    return inverse * (1 / 12 - square * (1 / 360 - square / 1260))


def _gamma_ratio_slope(x: Tensor, theta: Tensor) -> Tensor:
    """``theta * dA/dtheta``, elementwise."""
    low = theta + _SHIFT
    high = low + x
    slope = torch.log1p(x / low) + _digamma_rest(high) - _digamma_rest(low)
    for k in range(_SHIFT):
        slope += x / ((theta + k) * (theta + x + k))
    return slope.mul_(theta).sub_(x)


def _digamma_rest(y: Tensor) -> Tensor:
    """``digamma(y) - log(y)`` by its asymptotic series, to 6e-8 for y >= 4."""
    inverse = 1 / y
    square = inverse * inverse
    return -inverse / 2 - square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square / 240)))


def log_softmax_at(logits: Tensor, rho: Tensor, rows: Tensor, flat: Tensor) -> Tensor:
    """``log softmax(logits)`` at flat positions, from the softmax itself, without a second pass of exponentials.

    The normaliser comes from each row's largest entry, which is at least 1 / G, so nothing underflows.
    """
    normaliser = logits.amax(dim=1) - rho.amax(dim=1).log()
    return logits.reshape(-1).index_select(0, flat) - normaliser.index_select(0, rows)


class SparseNB(torch.autograd.Function):
    """Log-probability of sparse counts, ``[B]``; gradients for ``logits [B, G]`` and ``log_theta [G]``.

    ``apply(logits, log_theta, library, batch, counts)``: ``counts [NNZ]`` are those of the batch, in the dtype of the
    logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        log_theta: Tensor,
        library: Tensor,
        batch: CellBatch,
        counts: Tensor,
    ) -> Tensor:
        """Return log p(cell), ``[B]``."""
        logits, indptr, indices = logits.contiguous(), batch.indptr, batch.indices
        theta = log_theta.exp()
        ctx.compiled = logits.device.type == "cpu" and logits.dtype == torch.float32
        if ctx.compiled:
            return _forward_on_cpu(ctx, logits, log_theta, theta, library, indptr, indices, counts)
        rows = batch.rows
        flat = rows * logits.shape[1] + indices
        ratio = torch.softmax(logits, dim=1).mul_(library[:, None]).mul_(theta.reciprocal())
        zeros = torch.log1p(ratio) @ theta
        ratio_nnz = ratio.view(-1).index_select(0, flat)
        q_nnz = ratio_nnz.div_(ratio_nnz + 1)
        # log mu - log(1 + r) = log theta + log q; where rho underflowed, q is taken to be the smallest float.
        log_q = q_nnz.clamp_min(torch.finfo(q_nnz.dtype).tiny).log_()
        theta_nnz = theta.index_select(0, indices)
        term = log_q.add_(log_theta.index_select(0, indices)).mul_(counts).add_(_count_term(counts, theta_nnz))
        ctx.save_for_backward(theta, library, indptr, indices, counts, rows, flat, ratio, q_nnz, theta_nnz)
        return torch.segment_reduce(term, "sum", offsets=indptr, initial=0.0) - zeros

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Chain rule by hand.

        With ``q = r / (1 + r)``: d log p / d log mu = x (1 - q) - theta q and
        d log p / d log theta = theta (q - L) + x q + theta dA/dtheta; the softmax subtracts rho times the row's sum.
        """
        if ctx.compiled:
            return *_backward_on_cpu(ctx, grad), None, None, None
        theta, library, indptr, indices, counts, rows, flat, ratio, q_nnz, theta_nnz = ctx.saved_tensors
        grad_nnz = grad.index_select(0, rows)
        slope = (counts * q_nnz).add_(_gamma_ratio_slope(counts, theta_nnz)).mul_(grad_nnz)
        at_nonzero = counts * (1 - q_nnz)
        q = ratio / (ratio + 1)
        grad_log_theta = (grad @ q - grad @ torch.log1p(ratio)).mul_(theta).index_add_(0, indices, slope)
        rest = (q @ theta - torch.segment_reduce(at_nonzero, "sum", offsets=indptr, initial=0.0)) / library
        grad_logits = q.mul_(-theta).addcmul_(ratio * theta, rest[:, None]).mul_(grad[:, None])
        grad_logits.view(-1).index_add_(0, flat, at_nonzero.mul_(grad_nnz))
        return grad_logits, grad_log_theta, None, None, None


def _forward_on_cpu(
    ctx: Any, logits: Tensor, log_theta: Tensor, theta: Tensor, library: Tensor, *csr: Tensor
) -> Tensor:
    ratio, log_prob = torch.empty_like(logits), torch.empty_like(library)
    terms, slopes = sparse_cpu.tables(theta.numpy())
    number = parts(len(logits), logits.numel())
    arrays: Any = [tensor.detach().numpy() for tensor in (logits, log_theta, theta, library, *csr, ratio, log_prob)]
    sparse_cpu.forward(number, terms, *arrays)
    ctx.save_for_backward(theta, library, *csr, ratio, torch.from_numpy(slopes))
    return log_prob


def _backward_on_cpu(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients for logits ``[B, G]`` and log theta ``[G]``."""
    *saved, ratio, slopes = ctx.saved_tensors
    grad_logits = torch.empty_like(ratio)
    number = parts(len(ratio), ratio.numel())
    arrays: Any = [tensor.numpy() for tensor in (slopes, grad.contiguous(), *saved, ratio, grad_logits)]
    shares = sparse_cpu.backward(number, *arrays)
    return grad_logits, torch.from_numpy(shares.sum(axis=0))
