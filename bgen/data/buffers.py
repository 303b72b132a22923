"""Memory that is used again: a fresh array costs a page fault for every 4 kB, which is more than decoding into it."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

IDLE = 256
"""Calls after which memory that nobody asked for goes back to the system."""


class Pool:
    """Hands out arrays, and uses their memory again once nobody refers to them.

    An array, and views and tensors of it, may be kept as long as needed; nothing has to be given back. :meth:`hold`
    keeps what a GPU may still be copying from.

    Parameters
    ----------
    pinned
        Use page-locked memory, from which copies to a GPU run beside the computation.
    slack
        Share by which new memory is larger than asked for, so that it also fits requests of a slightly different size.
    """

    def __init__(self, *, pinned: bool = False, slack: float = 0.0) -> None:
        self.pinned, self.slack = pinned, slack
        self._buffers: list[NDArray[np.uint8]] = []
        self._used: list[int] = []  # number of the call that last took each
        self._calls = 0
        self._held: list[tuple[torch.cuda.Event, Any]] = []
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array with arbitrary contents."""
        n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        with self._lock:
            return self._find(n_bytes)[:n_bytes].view(dtype).reshape(shape)

    def hold(self, what: Any, event: torch.cuda.Event) -> None:
        """Refer to ``what`` until the event has happened."""
        with self._lock:
            self._held.append((event, what))

    @property
    def n_bytes(self) -> int:
        """Bytes that the pool has, used or not."""
        return sum(len(buffer) for buffer in self._buffers)

    def _find(self, n_bytes: int) -> NDArray[np.uint8]:
        self._calls += 1
        self._held = [(event, what) for event, what in self._held if not event.query()]
        best = -1
        for i in reversed(range(len(self._buffers))):
            if sys.getrefcount(self._buffers[i]) != _UNUSED:
                self._used[i] = self._calls
            elif n_bytes <= len(self._buffers[i]) <= 2 * n_bytes + 65_536:
                best = i if best < 0 or len(self._buffers[i]) < len(self._buffers[best]) else best
            elif self._calls - self._used[i] > IDLE:
                del self._buffers[i], self._used[i]
                best -= best > i
        if best < 0:
            room = int(n_bytes * (1 + self.slack))
            self._buffers.append(
                torch.empty(room, dtype=torch.uint8, pin_memory=True).numpy() if self.pinned else np.empty(room, "u1")
            )
            self._used.append(self._calls)
        else:
            self._used[best] = self._calls
        return self._buffers[best]


def _references() -> int:
    buffers = [np.empty(1, np.uint8)]
    return sys.getrefcount(buffers[0])


_UNUSED = _references()
"""What sys.getrefcount says of an array that only a list refers to."""
