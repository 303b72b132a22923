"""Where the chunks of a loader's windows lie in memory."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray


class Arena:
    """Room for the bytes of chunks, as slots that are taken and given back.

    The lowest free slots are taken first, and memory that was never written takes no room. So an arena costs as much as
    was in use at one time, not as much as it could hold.

    Parameters
    ----------
    slots
        Chunks that it can hold.
    gap_room, count_room
        Bytes of a chunk in the two streams.
    """

    def __init__(self, slots: int, gap_room: int, count_room: int) -> None:
        self.gaps = np.empty((slots, gap_room), np.uint8)
        self.counts = np.empty((slots, count_room), np.uint8)
        self._free = list(range(slots))

    def take(self, n: int) -> NDArray[np.int64] | None:
        """Return the numbers of n slots; None if so many are not free."""
        if n > len(self._free):
            return None
        return np.array([heapq.heappop(self._free) for _ in range(n)], np.int64)

    def give(self, slots: NDArray[np.int64]) -> None:
        """Give slots back."""
        for slot in slots.tolist():
            heapq.heappush(self._free, slot)
