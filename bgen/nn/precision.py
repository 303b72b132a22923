"""The precision that a network computes in: bfloat16 by autocast, what autocast says around an operator, and without.

What a user asks of a model in bfloat16 (:func:`computing`) is the work of its encoder and of its flow's network: matrix
products, which are most of it. These stay in float32 or wider:

- the solver's state and the whitened latents: steps of a solver are small, and bfloat16 tells apart some 250 numbers
  between one power of two and the next;
- the decoder, whose logits are the likelihood's parameters: around -10, where most genes are, bfloat16 has steps of
  1/16, which is 6 % of a gene's expected count;
- keyed random numbers, counts, and every statistic and score of cells.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from bgen.errors import UserError

Precision = Literal["float32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bf16")


def computing(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Within this, networks on a device compute in a precision; "float32": as they would anyhow."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def precision_of(name: str, device: torch.device) -> Precision:
    """Return the precision that a user means.

    Parameters
    ----------
    name
        "float32" or "bf16".
    device
        Where the network is.

    Raises
    ------
    UserError
        If there is no such precision, or the device or this torch cannot compute in it.
    """
    precision = next((known for known in PRECISIONS if known == name), None)
    if precision is None:
        raise UserError(f"There is no precision '{name}': it is {' or '.join(PRECISIONS)}.")
    if precision == "float32":
        return precision
    try:
        with warnings.catch_warnings(), computing(device, precision):
            warnings.simplefilter("error")  # torch warns, and computes in float32
            ones = torch.ones(2, 2, device=device)
            found = (ones @ ones).dtype
    except (RuntimeError, TypeError, UserWarning) as error:
        said = str(error).partition("\n")[0]
        raise UserError(f"precision bf16: {device} cannot compute in bfloat16 ({said}). Take float32.") from None
    if found != torch.bfloat16:
        raise UserError(f"precision bf16: this torch does not compute in bfloat16 on {device}. Take float32.")
    return precision


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off on the device of ``x``; on tensors without memory (meta), which have none, do nothing."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def as_autocast_says(x: Tensor) -> Tensor:
    """Return ``x`` in the precision of the autocast around this, which tensors without memory (meta) do not have."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if kind != "meta" and torch.is_autocast_enabled(kind) else x
