"""How fast a run goes and what it waits for."""

from __future__ import annotations

import resource
import sys
import time

import torch


class Throughput:
    """Counts since the last report. Cells and non-zeros are those of the global batch.

    Parameters
    ----------
    peak
        FLOP/s that all ranks together can do at most (:mod:`bgen.track.devices`); None if that is not known.
    """

    def __init__(self, peak: float | None = None) -> None:
        self._peak = peak
        self._reset()

    def _reset(self) -> None:
        self._begin = time.perf_counter()
        self._cells = 0
        self._nonzeros = 0
        self._flops = 0.0
        self._waited = 0.0

    def add(self, cells: int, nonzeros: int, waited: float, flops: float = 0.0) -> None:
        """Count one step: cells, non-zero counts, and seconds (mean over ranks) spent waiting for data.

        ``flops`` are the floating-point operations of the model, forward and backward, over all ranks; 0: not known.
        """
        self._flops += flops
        self._cells += cells
        self._nonzeros += nonzeros
        self._waited += waited

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on steps, such as evaluation and checkpoints."""
        self._begin += seconds

    def report(self) -> dict[str, float]:
        """Figures since the last report, and start anew.

        ``cells_per_s``, ``nonzeros_per_s``; ``data_wait``, the share of the time spent waiting for batches;
        ``memory_gb``, rank 0's peak so far (of the GPU where there is one). Where they are known: ``tflops_per_s`` of
        the model, and ``mfu``, its share of what the devices can do; time spent waiting counts.
        """
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        figures = {
            "cells_per_s": round(self._cells / seconds, 1),
            "nonzeros_per_s": round(self._nonzeros / seconds, 1),
            "data_wait": round(min(1.0, self._waited / seconds), 4),
            "memory_gb": round(peak_memory() / 1e9, 3),
        }
        if self._flops:
            figures["tflops_per_s"] = self._flops / seconds / 1e12
            if self._peak:
                figures["mfu"] = self._flops / seconds / self._peak
        self._reset()
        return figures


def peak_memory() -> int:
    """Largest memory of this process so far, in bytes: on the GPU if it uses one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
