"""The environment of a run: host, software, launcher, and the state of the source code."""

from __future__ import annotations

import functools
import hashlib
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
from bgen.passwords import without_passwords

# Prefixes of environment variables that decide how a run behaves.
PREFIXES = (
    *("BGEN_", "CUDA_", "NCCL_", "GLOO_", "TORCH", "DS_", "SLURM_JOB", "SLURM_NODE", "WORLD_SIZE"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "NUMBA_"),
)
# Those whose values are known to hold no secret. Of others that they are set is written, unless the value is a number
# or a switch.
OPEN = {
    *("BGEN_SET", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME"),
    *("NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_ALGO", "NCCL_PROTO", "NCCL_NET_GDR_LEVEL"),
    *("SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_NODELIST", "OMP_PROC_BIND", "OMP_PLACES", "KMP_AFFINITY"),
    *("MKL_THREADING_LAYER", "NUMBA_THREADING_LAYER", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"),
}
SET = "(set)"
_SWITCH = re.compile(r"[+-]?[\d.]{0,8}|true|false|on|off|yes|no|auto", re.IGNORECASE)
_OURS = re.compile(r'^name = "bgen-flow"$', re.MULTILINE)


def environment() -> dict[str, Any]:
    """JSON values: host, Python, packages, devices, variables of the launcher, bgen's own git commit; no secret."""
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": cpus(),
        "devices": devices,
        "command": [without_passwords(argument) for argument in sys.argv],
        "variables": variables(),
        "git": git_state(Path(__file__).resolve().parents[1]),
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


def variables() -> dict[str, str]:
    """Return the environment variables that decide how a run behaves; values that may be secret are left out."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)}
    return {name: value if name in OPEN or _SWITCH.fullmatch(value) else SET for name, value in found.items()}


def git_state(package: Path) -> dict[str, Any] | None:
    """Return commit and branch of the checkout of bgen that ``package`` is in, and whether it has changes.

    None if it is in no such checkout: a repository that an installed bgen happens to lie in is the user's, and nobody
    else's business. Of the changes themselves only the SHA-256 is told.
    """
    root = package.parent
    asked = {
        "top": ("rev-parse", "--show-toplevel"),
        "commit": ("rev-parse", "HEAD"),
        "branch": ("rev-parse", "--abbrev-ref", "HEAD"),
        "changes": ("diff", "HEAD"),
    }
    found = {}
    for name, arguments in asked.items():
        try:
            if name == "top" and not _OURS.search((root / "pyproject.toml").read_text(encoding="utf-8")):
                return None
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False, timeout=20
            )
        except (OSError, ValueError, subprocess.TimeoutExpired):
            return None
        found[name] = done.stdout.strip()
        if done.returncode != 0 or (name == "top" and Path(found[name]).resolve() != root.resolve()):
            return None
    changes = found["changes"]
    return {
        "commit": found["commit"],
        "branch": found["branch"],
        "dirty": bool(changes),
        "changes_sha256": hashlib.sha256(changes.encode()).hexdigest() if changes else None,
    }
