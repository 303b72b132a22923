"""How much memory some work takes: sampled all the time, and the most counts.

Pages of the process' own (RssAnon of ``/proc/self/status``) are apart from pages of files that it has mapped, which it
shares with the other processes of the machine (RssFile).
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path


def measure(work: Callable[[Path], object], folder: Path) -> dict[str, float]:
    """Return the most memory that some work takes beyond what there was before, in bytes, and its CPU seconds."""
    gc.collect()
    _give_back()
    before, seconds = _resident(), time.process_time()
    most = dict(before)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            for kind, size in _resident().items():
                most[kind] = max(most[kind], size)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        kept = work(folder)
        now = _resident()
    finally:
        ended.set()
        watching.join()
    del kept
    used = {kind: float(max(most[kind], now[kind]) - before[kind]) for kind in before}
    return {**used, "seconds": time.process_time() - seconds}


def _give_back() -> None:
    """Give back to the system what was freed before: given back later, it would hide as much of what is taken."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _resident() -> dict[str, int]:
    """Return the bytes of a process' own pages, and of pages of files."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    sizes = {
        name: int(value.split()[0]) << 10 for name, _, value in (line.partition(":") for line in lines) if "Rss" in name
    }
    return {"own": sizes["RssAnon"], "shared": sizes["RssFile"] + sizes["RssShmem"]}
