"""How much of the host's memory this process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil

from bgen.cgroups import cgroups, read_text

FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""By version of a cgroup: the files with its limit and with what it has taken, and the line of ``memory.stat`` with the
part of that which is cached files, which the kernel gives back when somebody needs memory."""


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process may still take.

    What the machine has available, and no more than is left in the limits of the cgroups that this process is in
    (Kubernetes' limit, Slurm's ``--mem``, Docker's ``--memory``).

    Parameters
    ----------
    root
        Where ``proc`` and the mounted cgroups are.
    """
    left = [_left(version, group) for version, group in cgroups("memory", root)]
    return max(0, min([int(psutil.virtual_memory().available), *(bytes_ for bytes_ in left if bytes_ is not None)]))


def _left(version: int, group: Path) -> int | None:
    """Return the bytes that are left in a cgroup, or None if it has no limit."""
    limit, taken, cached = FILES[version]
    most, now = read_text(group / limit).strip(), read_text(group / taken).strip()
    if not most.isdecimal() or not now.isdecimal():
        return None
    lines = (line.split() for line in read_text(group / "memory.stat").splitlines())
    return int(most) - int(now) + next((int(number) for name, number in lines if name == cached), 0)
