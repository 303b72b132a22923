"""How many threads a compiled loop over rows takes.

numba's threads are torch's, of one OpenMP runtime: torch is imported here, so its runtime is loaded before numba looks
for one, and :mod:`bgen.cpus` lets numba prefer OpenMP to a pool of its own. Two pools would compete, as threads look
for work for a while after each operation (measured: 8.6 ms instead of 5.6 for a product and a loop of 2.8 each).
"""

from __future__ import annotations

import numba
import torch

WORTH = 1 << 16
"""Elements of work that are worth a thread."""


def parts(rows: int, work: int) -> int:
    """Into how many parts to cut ``rows`` that are ``work`` elements in all: at most one per thread of torch.

    Call it right before the loop, which is to be a ``numba.prange`` over the parts: it also limits numba's threads.
    """
    threads = torch.get_num_threads()
    most: int = getattr(numba.config, "NUMBA_NUM_THREADS")  # noqa: B009 - made at run time
    found = max(1, min(threads, most, rows, work // WORTH))
    numba.set_num_threads(found)
    if torch.get_num_threads() != threads:  # as numba's threads start, OpenMP is told their number, for torch too
        torch.set_num_threads(threads)
    return found
