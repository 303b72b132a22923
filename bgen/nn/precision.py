"""What autocast says around an operator, and computing without it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off on the device of ``x``; on tensors without memory (meta), which have none, do nothing."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def as_autocast_says(x: Tensor) -> Tensor:
    """Return ``x`` in the precision of the autocast around this, which tensors without memory (meta) do not have."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if kind != "meta" and torch.is_autocast_enabled(kind) else x
