"""Whether tensors are where Triton's kernels run. torch's builds for CUDA bring Triton."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

HAVE_TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed: a constant, which a compiled block may ask for."""


def usable(tensor: Tensor) -> bool:
    """Whether this tensor is on a device, and in a precision, for which there are kernels."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and HAVE_TRITON
