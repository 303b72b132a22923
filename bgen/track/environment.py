"""What a run ran in: host, software, launcher, and the state of the source code."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from bgen.cpus import cpus

# Prefixes of environment variables that decide how a run behaves. Values may hold secrets elsewhere; not in these.
PREFIXES = (
    *("BGEN_", "CUDA_", "NCCL_", "GLOO_", "TORCH", "DS_", "SLURM_JOB", "SLURM_NODE", "WORLD_SIZE"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "NUMBA_"),
)


def environment() -> dict[str, Any]:
    """JSON values: host, Python, packages, devices, variables of the launcher, git commit and changes to it."""
    packages = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions() if d.metadata["Name"]})
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": cpus(),
        "devices": devices,
        "command": sys.argv,
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)},
        "git": git_state(Path(__file__).resolve().parent),
        "packages": packages,
    }


def git_state(folder: Path) -> dict[str, str] | None:
    """Commit, branch and uncommitted changes of the repository that ``folder`` is in; None outside of one."""
    asked = {
        "commit": ("rev-parse", "HEAD"),
        "branch": ("rev-parse", "--abbrev-ref", "HEAD"),
        "changes": ("diff", "HEAD"),
    }
    found = {}
    for name, arguments in asked.items():
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0:
            return None
        found[name] = done.stdout.strip()
    return found
