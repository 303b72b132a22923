"""How fast a run goes and what it waits for."""

from __future__ import annotations

import resource
import sys
import time

import torch


class Throughput:
    """Counts since the last report. Cells and non-zeros are those of the global batch."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._begin = time.perf_counter()
        self._cells = 0
        self._nonzeros = 0
        self._waited = 0.0

    def add(self, cells: int, nonzeros: int, waited: float) -> None:
        """Count one step: cells, non-zero counts, and seconds (mean over ranks) spent waiting for data."""
        self._cells += cells
        self._nonzeros += nonzeros
        self._waited += waited

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on steps, such as evaluation and checkpoints."""
        self._begin += seconds

    def report(self) -> dict[str, float]:
        """Figures since the last report, and start anew.

        ``cells_per_s``, ``nonzeros_per_s``; ``data_wait``, the share of the time spent waiting for batches;
        ``memory_gb``, rank 0's peak so far (of the GPU where there is one).
        """
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        figures = {
            "cells_per_s": round(self._cells / seconds, 1),
            "nonzeros_per_s": round(self._nonzeros / seconds, 1),
            "data_wait": round(min(1.0, self._waited / seconds), 4),
            "memory_gb": round(peak_memory() / 1e9, 3),
        }
        self._reset()
        return figures


def peak_memory() -> int:
    """Largest memory of this process so far, in bytes: on the GPU if it uses one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
