"""The environment of a run: host, software, launcher, and the state of the source code."""

from __future__ import annotations

import functools
import os
import platform
import re
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
        "packages": list(packages()),
    }


@functools.cache
def packages() -> tuple[str, ...]:
    """Return what is installed, as in "numpy==2.5.0", sorted; looked up once in a process.

    Only the head of a package's metadata is read: the body is its page on PyPI, and to parse all of them takes half a
    second.
    """
    found = set()
    for distribution in distributions():
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        head = re.split(r"\r?\n\r?\n", text, maxsplit=1)[0]
        fields = dict(re.findall(r"^(Name|Version): *(.*?)\s*$", head, re.MULTILINE))
        if len(fields) == 2:
            found.add(f"{fields['Name']}=={fields['Version']}")
    return tuple(sorted(found))


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
