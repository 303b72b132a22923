"""Whether tensors are where Triton's kernels run. torch's builds for CUDA bring Triton."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

HAVE_TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed: a constant, which a compiled block may ask for."""


def usable(tensor: Tensor) -> bool:
    """Whether there are kernels for a tensor's device and precision; one without memory stands for a GPU's."""
    here = tensor.device.type == "meta" or (tensor.is_cuda and HAVE_TRITON)
    return here and tensor.dtype != torch.float64
