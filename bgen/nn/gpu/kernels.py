"""Whether tensors are where Triton's kernels run. torch's builds for CUDA bring Triton."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor


@cache
def have_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def usable(tensor: Tensor) -> bool:
    """Whether this tensor is on a device, and in a precision, for which there are kernels."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and have_triton()
