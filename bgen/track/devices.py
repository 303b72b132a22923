"""What accelerators can do at most, for plans of runs and for MFU. A device that is not listed has no MFU."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Figures of the manufacturer's data sheet.

    Attributes
    ----------
    bfloat16, float32
        FLOP/s of dense matrix products (without sparsity), on tensor cores and in float32.
    memory
        Bytes.
    link
        Bytes/s in one direction between the devices of a host: NVLink, or PCIe where there is none.
    bandwidth
        Bytes/s of the memory.
    """

    bfloat16: float
    float32: float
    memory: float
    link: float = 32e9
    bandwidth: float = 1e12

    def peak(self, precision: str) -> float:
        """FLOP/s in float32, or in any other precision of :class:`bgen.config.train.TrainConfig`: they use bfloat16."""
        return self.float32 if precision == "float32" else self.bfloat16


DEVICES = {
    "B200": Device(2250e12, 75e12, 180e9, 900e9, 8e12),
    "GH200": Device(989e12, 67e12, 96e9, 450e9, 4e12),
    "H200": Device(989e12, 67e12, 141e9, 450e9, 4.8e12),
    "H100 PCIe": Device(756e12, 51e12, 80e9, 64e9, 2e12),
    "H100 NVL": Device(835e12, 60e12, 94e9, 300e9, 3.9e12),
    "H100": Device(989e12, 67e12, 80e9, 450e9, 3.35e12),
    "A100": Device(312e12, 19.5e12, 80e9, 300e9, 2e12),
    "L40S": Device(362e12, 91.6e12, 48e9, bandwidth=0.864e12),
    "L4": Device(121e12, 30.3e12, 24e9, bandwidth=0.3e12),
    "RTX 4090": Device(165e12, 82.6e12, 24e9, bandwidth=1.008e12),
}
"""By a part of the name that CUDA gives; the first that fits counts."""


def peak_flops(name: str, precision: str) -> float | None:
    """FLOP/s of one device that CUDA calls ``name``; None if it is not known."""
    return next((device.peak(precision) for part, device in DEVICES.items() if part in name), None)


def device_name(device: torch.device) -> str:
    """Name of a device as its maker gives it; "cpu" for processors."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
