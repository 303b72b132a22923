"""The most floating-point operations a second that devices can do, for MFU.

Dense matrix products, from the manufacturers' data sheets (without sparsity). A device that is not listed has no MFU.
"""

from __future__ import annotations

import torch

PEAKS = {
    # part of the name that CUDA gives: (bfloat16 tensor cores, float32)
    "B200": (2250e12, 75e12),
    "GH200": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "RTX 4090": (165e12, 82.6e12),
}
"""FLOP/s by name; the first name that fits counts."""


def peak_flops(name: str, precision: str) -> float | None:
    """FLOP/s of one device called ``name``; None if it is not known.

    ``precision`` is that of :class:`bgen.config.train.TrainConfig`: float32, or one that computes in bfloat16.
    """
    for part, (bfloat16, float32) in PEAKS.items():
        if part in name:
            return float32 if precision == "float32" else bfloat16
    return None


def device_name(device: torch.device) -> str:
    """Name of a device as its maker gives it; "cpu" for processors."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
