"""Computing in the precision of the inputs, whatever autocast says around it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off on the device of ``x``; on tensors without memory (meta), which have none, do nothing."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)
