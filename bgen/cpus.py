"""How many CPUs this process may use, and how the threads of torch and numba share them with other programs.

``import bgen`` calls :func:`prepare` before anything else, as OpenMP's runtimes read their settings when they are
loaded, which is when torch is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from bgen.cgroups import cgroups, read_text

MARK, SEPARATOR = "BGEN_SET", ";"
"""Environment variable that says what :func:`prepare` set, as ``NAME=value;NAME=value``."""

LAYERS = "omp tbb workqueue"
"""Where numba takes its threads from, the first that there is."""

WAITING = {
    # A thread that waits for work looks for it so many times before it sleeps: some microseconds instead of some
    # milliseconds. Where another program keeps a core busy, the others would look in vain until the one that holds the
    # work gets its turn. Measured beside one on two cores: 13,700 cells/s instead of 500; alone 14,000 instead of
    # 15,800, which fewer threads make good (bgen.train.threads).
    "GOMP_SPINCOUNT": "1000",  # GNU's runtime, that of torch's packages for Linux
    "KMP_BLOCKTIME": "1",  # Intel's and LLVM's, as on macOS: milliseconds instead of 200
}


def cpus() -> int:
    """Return how many CPUs this process may use at a time, at least 1.

    As many as it is bound to (``taskset``, Slurm, Docker's ``--cpuset-cpus``), and no more than whole ones in the
    quota of its cgroup (Kubernetes' limit, Docker's ``--cpus``).
    """
    quota = cpu_quota()
    return bound_to() if quota is None else max(1, min(bound_to(), int(quota)))


def bound_to() -> int:
    """Return the number of CPUs that this process may be run on, whatever share of their time it gets."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the CPUs' worth of time that the cgroup of this process may use, or None if it is not limited.

    Of the cgroups that this process is in and those above them, in either version, the smallest quota counts.

    Parameters
    ----------
    root
        Where ``proc`` and the mounted cgroups are.
    """
    quotas = (_quota_2(group) if version == 2 else _quota_1(group) for version, group in cgroups("cpu", root))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_2(group: Path) -> float | None:
    text = read_text(group / "cpu.max").split()
    return None if not text or text[0] == "max" else int(text[0]) / int(text[1])


def _quota_1(group: Path) -> float | None:
    quota, period = read_text(group / "cpu.cfs_quota_us"), read_text(group / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def cores() -> int:
    """Return the number of cores that this process may be run on; a core may be seen as two CPUs."""
    if not hasattr(os, "sched_getaffinity"):
        return bound_to()
    paths = (f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in os.sched_getaffinity(0))
    siblings = [read_text(Path(path)) for path in paths]
    return len(set(siblings)) if all(siblings) else bound_to()


def prepare() -> None:
    """Set what the runtimes of torch's and numba's threads read when they are loaded; what the user set stands.

    Threads that wait sleep soon. numba takes OpenMP's threads, which torch has already, rather than a pool of its own.
    Where the quota is less than the CPUs that can be seen, torch starts a thread for each that it allows; of numba's,
    no more are used (:mod:`bgen.nn.cpu.threads`).

    Where torch is loaded already, as in a notebook, the number of its threads can still be lowered; how long they look
    for work cannot, but programs that this one starts find the settings.
    """
    as_given = without_ours(os.environ)
    for name in os.environ.keys() - as_given.keys():
        del os.environ[name]
    settings = {} if "OMP_WAIT_POLICY" in os.environ else dict(WAITING)
    if "NUMBA_THREADING_LAYER" not in os.environ:
        settings["NUMBA_THREADING_LAYER_PRIORITY"] = LAYERS
    allowed = cpus()
    limited = allowed < bound_to() and threads_are_free()
    if limited:
        settings["OMP_NUM_THREADS"] = str(min(allowed, cores()))
    made = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(made)
    os.environ[MARK] = SEPARATOR.join(f"{name}={value}" for name, value in made.items())
    torch, numba = sys.modules.get("torch"), sys.modules.get("numba")
    if torch is not None and limited and torch.get_num_threads() in (bound_to(), cores()):
        torch.set_num_threads(min(allowed, cores()))
    if numba is not None and "NUMBA_THREADING_LAYER_PRIORITY" in made:
        numba.config.THREADING_LAYER_PRIORITY = LAYERS.split()


def without_ours(environment: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables without those that :func:`prepare` set, here or in a process that started this."""
    pairs = (pair.partition("=")[::2] for pair in environment.get(MARK, "").split(SEPARATOR))
    ours = {name for name, value in pairs if environment.get(name) == value} | {MARK}
    return {name: value for name, value in environment.items() if name not in ours}


def threads_are_free() -> bool:
    """Return whether the user left it open how many threads torch takes."""
    return not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & without_ours(os.environ).keys()
