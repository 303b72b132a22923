"""The control groups of Linux that this process is in, where containers and schedulers set limits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def cgroups(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """Yield version and folder of the cgroups that this process is in, and of those above them, in either version.

    Parameters
    ----------
    controller
        What is limited: "cpu", "memory".
    root
        Where ``proc`` and the mounted cgroups are.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    own = {}  # version to the path of the cgroup
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            own[2] = path
        elif controller in controllers.split(","):
            own[1] = path
    for version, top, mounted_at in _mounted(mounts, controller):
        if version in own:
            folder = root / mounted_at.lstrip("/")
            for own_path in _upwards(own[version], top):
                yield version, folder / own_path


def _mounted(lines: list[str], controller: str) -> Iterator[tuple[int, str, str]]:
    """Yield version, the cgroup that is mounted, and where, of each mount that may hold limits."""
    for line in lines:
        fields, _, about = line.partition(" - ")
        kind, _, options = about.split(" ", 2)
        top, mounted_at = (
            re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field) for field in fields.split(" ")[3:5]
        )
        if kind == "cgroup2":
            yield 2, top, mounted_at
        elif kind == "cgroup" and controller in options.split(","):
            yield 1, top, mounted_at


def _upwards(path: str, top: str) -> list[str]:
    """Return a cgroup's path below the one that is mounted, and those of the cgroups between the two.

    A container may see a path that does not begin at what is mounted there: then the mounted cgroup is its own.
    """
    group = PurePosixPath(path)
    if ".." in group.parts or not group.is_relative_to(top):
        return ["."]
    below = group.relative_to(top)
    return [str(below), *map(str, below.parents)]


def read_text(path: Path) -> str:
    """Return what a file holds, nothing if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
