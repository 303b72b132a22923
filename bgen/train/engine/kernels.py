"""What a run needs beside torch, asked before it starts: kernels of mixers, and a compiler for compiled blocks."""

from __future__ import annotations

import importlib.util
import socket

import torch
from torch import nn

from bgen.distributed import world as ranks
from bgen.errors import UserError
from bgen.nn.mixers.mixer import Mixer


def missing_here(module: nn.Module, device: torch.device, compiling: bool) -> list[str]:
    """Return what this host lacks to train a module on a device, each thing once."""
    mixers = [part for part in module.modules() if isinstance(part, Mixer)]
    found = [problem for mixer in mixers if (problem := mixer.lacks(device)) is not None]
    if compiling and device.type == "cuda" and importlib.util.find_spec("triton") is None:
        found.append('train.compile on CUDA needs Triton: pip install "triton>=3.5", or set train.compile=false.')
    return list(dict.fromkeys(found))


def require_kernels(module: nn.Module, world: ranks.World, compiling: bool = False) -> None:
    """Check, on all ranks together, that a module can be trained on their devices.

    Parameters
    ----------
    module
        On whatever device it is.
    world
        This rank's place.
    compiling
        Whether its blocks will be compiled.

    Raises
    ------
    UserError
        On every rank, if something is missing on any of them: what, on which hosts, and what to do.
    """
    here = (socket.gethostname(), missing_here(module, world.device, compiling))
    hosts: dict[str, list[str]] = {}
    for host, problems in ranks.gather(here):
        for problem in problems:
            hosts.setdefault(problem, []).append(host)
    if hosts:
        several = world.size > 1
        told = (
            (f"On {', '.join(dict.fromkeys(names))}: " if several else "") + problem for problem, names in hosts.items()
        )
        raise UserError("\n".join(told))
