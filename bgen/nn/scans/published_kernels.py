"""The published kernels of mamba-ssm, imported without what they do not need.

``import mamba_ssm`` runs an ``__init__`` that needs ``selective_scan_cuda``, a compiled CUDA extension that Mamba-2
does not use (release 2.3.2.post1). So the kernels are imported through an empty shell of the package that has only its
path. They then need torch, triton, einops and packaging.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from bgen.errors import UserError
from bgen.nn.real_time import SMALLEST_STEP
from bgen.nn.scans.published_shapes import ssd_in_shape

INSTALL = (
    'pip install "triton>=3.5" einops packaging ninja setuptools wheel && '
    "MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE "
    "pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1"
)
"""How to get mamba2's kernels, without a CUDA compiler. mamba-ssm's build imports torch, hence no isolation; its other
dependencies (over 1 GB) belong to Mamba-3."""

INSTALL_COMPILED = INSTALL.replace("MAMBA_SKIP_CUDA_BUILD=TRUE ", "").replace(
    "--no-deps", "--no-cache-dir --force-reinstall --no-deps"
)
"""How to get mamba1's kernel, which is compiled: needs nvcc of torch's CUDA version, and many minutes. pip would
otherwise take the wheel without it that the command above left in its cache."""

KERNELS = {
    "mamba2": ("ops.triton.ssd_combined", INSTALL),
    "mamba1": ("ops.selective_scan_interface", INSTALL_COMPILED),
}
"""Mixer to the module that has its kernels, and how to install them."""


def import_published(name: str) -> ModuleType:
    """Import ``mamba_ssm.<name>`` without running ``mamba_ssm/__init__.py``.

    Raises
    ------
    ImportError
        The package, or something that the module needs, is not installed.
    """
    if "mamba_ssm" in sys.modules:
        return importlib.import_module(f"mamba_ssm.{name}")
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("mamba_ssm is not installed")
    shell = ModuleType("mamba_ssm")
    shell.__path__ = list(spec.submodule_search_locations)
    sys.modules["mamba_ssm"] = shell
    try:
        return importlib.import_module(f"mamba_ssm.{name}")
    finally:
        # Whoever imports mamba_ssm later shall get the package itself.
        del sys.modules["mamba_ssm"]


@cache
def missing(mixer: str) -> str | None:
    """Why the kernels of a mixer cannot be imported; None where they can."""
    try:
        import_published(KERNELS[mixer][0])
    except ImportError as error:
        return str(error)
    return None


def lacking(mixer: str, backend: str, device: torch.device) -> str | None:
    """Say what keeps a mixer from computing on a device, and what to do; None where nothing does.

    ``backend`` is ``torch``, ``fused``, or ``auto``: fused on CUDA and torch elsewhere. There is no silent fall-back to
    torch on CUDA, where it is several times slower.
    """
    if not _wants_fused(backend, device):
        return None
    if (reason := missing(mixer)) is not None:
        return (
            f"{mixer} on {device.type} needs the kernels of mamba-ssm ({reason}). Install them:\n"
            f"  {KERNELS[mixer][1]}\nor set {mixer}.backend to torch (slow): flow.backbone.{mixer}.backend=torch"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"flow.backbone.{mixer}.backend=fused computes on CUDA only, and this is {device.type}: set it to auto, "
            "which is the kernels on CUDA and torch elsewhere."
        )
    return None


def _wants_fused(backend: str, device: torch.device) -> bool:
    return backend == "fused" or (backend == "auto" and device.type == "cuda")


def use_fused(mixer: str, backend: str, device: torch.device) -> bool:
    """Decide between the fused kernels and torch.

    Raises
    ------
    UserError
        The kernels are wanted and are not there (:func:`lacking`).
    """
    if device.type == "meta":  # stands for a GPU
        return mixer == "mamba2" and backend != "torch"
    if not _wants_fused(backend, device):
        return False
    if (problem := lacking(mixer, backend, device)) is not None:
        raise UserError(problem)
    return True


def ssd_fused(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTKS: Tensor,
    c_BTKS: Tensor,
    initial_BHPS: Tensor | None = None,
    sequence_BT: Tensor | None = None,
    *,
    impulse: bool,
) -> tuple[Tensor, Tensor]:
    """SSD with log_decay = dt a by the published kernels; see :func:`bgen.nn.scans.ssd.ssd_sequential`.

    The kernels scale x by dt. ``impulse`` undoes that, for inputs that must not grow with the time gap; dt must then be
    at least the floor of :mod:`bgen.nn.real_time`, or 0 where x is 0 as well. The initial state belongs to the first
    sequence; the numbers in ``sequence_BT`` start at 0 and rise.
    """
    if impulse:
        x_BTHP = (x_BTHP / dt_BTH.clamp_min(SMALLEST_STEP)[..., None]).to(x_BTHP.dtype)
    if x_BTHP.device.type == "meta":
        return ssd_in_shape(x_BTHP, dt_BTH, a_H, b_BTKS, c_BTKS)
    return import_published(KERNELS["mamba2"][0]).mamba_chunk_scan_combined(
        x_BTHP,
        dt_BTH,
        a_H,
        b_BTKS,
        c_BTKS,
        chunk_size=64 if x_BTHP.shape[1] <= 64 else 256,
        initial_states=initial_BHPS,
        seq_idx=None if sequence_BT is None else sequence_BT.int(),
        return_final_states=True,
    )


def selective_scan_fused(
    x_BTE: Tensor, dt_BTE: Tensor, a_ES: Tensor, b_BTS: Tensor, c_BTS: Tensor, *, impulse: bool
) -> Tensor:
    """Compute :func:`bgen.nn.scans.selective_scan.selective_scan` of the input dt x by the published CUDA kernel.

    ``impulse`` as in :func:`ssd_fused`. All in float32, since the kernel wants dt in the dtype of x.
    """
    wide = torch.promote_types(x_BTE.dtype, torch.float32)
    x, dt, b, c = (t.to(wide).transpose(1, 2).contiguous() for t in (x_BTE, dt_BTE, b_BTS, c_BTS))
    if impulse:
        x = x / dt.clamp_min(SMALLEST_STEP)
    y = import_published(KERNELS["mamba1"][0]).selective_scan_fn(x, dt, a_ES.to(wide), b, c)
    return y.transpose(1, 2).to(x_BTE.dtype)
