"""How many cells are computed at a time: as many as the device's memory holds, and fewer when it runs out.

What is made of a cell is a function of the cell and of its key, so how many are computed with it changes nothing but
the last bits of products of matrices, and on a CPU as a rule not even those (:data:`LEAST`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from bgen.distributed.world import read_world
from bgen.errors import UserError, memory_ran_out
from bgen.memory import free_memory
from bgen.nn.memory import LiveBytes, free_on, give_back

LEAST = 32
"""A network is given a multiple of so many cells: libraries multiply a matrix of a few rows, and the rows that are left
over of a large one, by other code, whose last bits differ. So the rows of MKL's float32 products were the same to the
last bit in batches of any size (one and two threads)."""

FIRST = 256
"""Cells of the first batch, which is measured."""

FILL = 0.5
"""Share of the free memory that a batch may take: later ones may hold more counts than the first, and what libraries
take beside torch's tensors is not seen."""

ENTRIES = 1 << 24
"""Counts of a batch, cells times genes, at most on a CPU, whose caches hold no more: larger ones are not faster."""

MOST = 65_536
"""Cells of a batch, at most on a GPU."""

Made = TypeVar("Made")


def on_cpu(genes: int) -> int:
    """Return how many cells of so many genes a batch holds on a CPU."""
    return max(1, ENTRIES // genes)


class Batches:
    """Computes on cells, a batch at a time: the first of :data:`FIRST` cells, the others as large as memory allows.

    Parameters
    ----------
    device
        Where the network is.
    on_cpu
        Cells of a batch, at most on a CPU.
    dense
        Bytes that come to the host for each cell.
    unit
        Cells that one number of :meth:`over` stands for, such as those of a trajectory.
    """

    def __init__(self, device: torch.device, on_cpu: int, *, dense: int = 0, unit: int = 1) -> None:
        self.device, self.dense, self.unit = device, dense * unit, unit
        self.most = max(1, (on_cpu if device.type == "cpu" else MOST) // unit)
        self.size = min(self.most, max(1, FIRST // unit))
        self._measured = self.size == self.most

    def over(self, n: int, compute: Callable[[int, int], Made], *, together: int | None = None) -> Iterator[Made]:
        """Yield ``compute(start, stop)`` of parts of ``range(n)``, in order.

        Where memory runs out, half of the cells are computed, and all further batches are of that size.

        Parameters
        ----------
        together
            So many are always computed together, whatever the memory: for what depends on the cells beside.

        Raises
        ------
        UserError
            If there is no memory for a single one.
        """
        if together is not None:
            for start in range(0, n, together):
                yield compute(start, min(start + together, n))
            return
        start = 0
        while start < n:
            stop = min(start + self.size, n)
            try:
                if self._measured or stop == n:
                    made = compute(start, stop)
                else:
                    made = self._measure(start, stop, compute)
            except (RuntimeError, MemoryError) as error:
                if not memory_ran_out(error):
                    raise
                if stop - start == 1:
                    said = str(error).strip().partition("\n")[0] or type(error).__name__
                    elsewhere = "" if self.device.type == "cpu" else ", or take another device (--device cpu)"
                    raise UserError(
                        f"{self.device}: no memory is left for a single cell. Free some{elsewhere}. ({said})"
                    ) from error
                self.size, self._measured = (stop - start) // 2, True
            else:
                yield made
                start = stop
                continue
            give_back(self.device)  # here, where the error holds none of it any more

    def _measure(self, start: int, stop: int, compute: Callable[[int, int], Made]) -> Made:
        """Compute the first batch, and choose the size of the others by what it takes."""
        with LiveBytes(()) as live:
            made = compute(start, stop)
        processes = read_world().local_size
        each = live.peak / (stop - start)
        if self.device.type == "cpu":
            fits = free_on(self.device, processes) / max(1.0, each + self.dense)
        else:
            fits = free_on(self.device) / max(1.0, each)
            fits = min(fits, free_memory() / processes / max(1, self.dense))
        size = min(self.most, max(1, int(FILL * fits)))
        self.size, self._measured = size - size % LEAST if self.unit == 1 and size > LEAST else size, True
        return made


def filled_up(start: int, stop: int) -> NDArray[np.int64]:
    """Return the numbers of some cells, the last of them repeated until there are a multiple of :data:`LEAST`."""
    return np.arange(start, start + -(-(stop - start) // LEAST) * LEAST).clip(max=stop - 1)
