"""The likelihoods of sparse counts as one operator on GPUs, by the kernels of sparse_triton.py.

Where Triton is installed, which torch's builds for CUDA bring, tensors on CUDA go this way; logits stay in the
precision in which the decoder made them. As operators of torch they can be traced and compiled.

Axes: B cells, G genes, NNZ non-zero counts.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bgen.data.batch import CellBatch

_COUNTS = "Tensor log_theta, Tensor library, Tensor indptr, Tensor indices, Tensor counts"


@cache
def _kernels() -> Any:
    return importlib.import_module("bgen.models.likelihoods.sparse_triton")


@cache
def _have_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def usable(logits: Tensor) -> bool:
    """Whether these logits are on a device for which there are kernels; tensors without memory stand for a GPU's."""
    here = logits.device.type == "meta" or (logits.is_cuda and _have_triton())
    return here and logits.dtype != torch.float64


@torch.library.custom_op(
    "bgen::log_prob", mutates_args=(), schema=f"(Tensor logits, Tensor? dropout, {_COUNTS}) -> (Tensor, Tensor)"
)
def _log_prob(logits, dropout, log_theta, library, indptr, indices, counts):  # type: ignore[no-untyped-def]
    return _kernels().forward(logits, dropout, log_theta, library, indptr, indices, counts)


@_log_prob.register_fake
def _(logits, dropout, log_theta, library, indptr, indices, counts):  # type: ignore[no-untyped-def]
    return torch.empty_like(library), torch.empty_like(library)


@torch.library.custom_op(
    "bgen::log_prob_gradients",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor normaliser, Tensor logits, Tensor? dropout, {_COUNTS}) -> (Tensor, Tensor, Tensor)",
)
def _gradients(grad, normaliser, logits, dropout, log_theta, *counts):  # type: ignore[no-untyped-def]
    of_logits, of_dropout, of_theta = _kernels().backward(grad, normaliser, logits, dropout, log_theta, *counts)
    return of_logits, logits.new_empty(0) if of_dropout is None else of_dropout, of_theta


@_gradients.register_fake
def _(grad, normaliser, logits, dropout, log_theta, *counts):  # type: ignore[no-untyped-def]
    of_dropout = logits.new_empty(0) if dropout is None else torch.empty_like(dropout)
    return torch.empty_like(logits), of_dropout, torch.empty_like(log_theta)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, dropout: Tensor | None, *others: Tensor) -> Tensor:
        log_prob, normaliser = _log_prob(logits, dropout, *others)
        ctx.save_for_backward(normaliser, logits, dropout, *others)
        return log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_logits, of_dropout, of_theta = _gradients(grad, *ctx.saved_tensors)
        return of_logits, None if ctx.saved_tensors[2] is None else of_dropout, of_theta, None, None, None, None


def log_prob(logits: Tensor, dropout: Tensor | None, log_theta: Tensor, library: Tensor, batch: CellBatch) -> Tensor:
    """Return log p of each cell, float32 ``[B]``, with gradients for logits, dropout and log theta.

    Parameters
    ----------
    logits, dropout
        ``[B, G]``; ``dropout`` None: no zero inflation.
    log_theta, library
        float32 ``[G]``, ``[B]``.
    batch
        The counts.
    """
    dropout = None if dropout is None else dropout.contiguous()
    csr = (batch.indptr, batch.indices, batch.counts.float())
    answer: Tensor = _Fused.apply(logits.contiguous(), dropout, log_theta, library, *csr)
    return answer
