"""Arrays with an entry a cell that lie in files without a name, so that no process has to hold them in memory.

A file is mapped: its pages are the system's to keep or to write out. It vanishes with the last array that uses it, also
when the process is killed. The files are in the folder for temporary files (TMPDIR).
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bgen.errors import Unreachable
from bgen.order.groups import parts

LEAST = 1 << 16
"""Bytes from which on an array is in a file."""

SHARED = 16 << 20
"""Bytes of a file that smaller arrays share: a process can have some 65,000 files mapped."""


def room(shape: int | tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return an array of zeros, in a file unless it is small.

    Raises
    ------
    Unreachable
        If there is no room for the file.
    """
    of = np.dtype(dtype)
    size = math.prod(shape if isinstance(shape, tuple) else (shape,)) * of.itemsize
    if size < LEAST:
        return np.zeros(shape, of)
    if size >= SHARED:
        return _file(size).view(of).reshape(shape)
    with _lock:
        if _last.pid != os.getpid() or _last.used + size > SHARED:  # a fork does not write where this one does
            _last.file = _file(SHARED)
            _last.pid, _last.used = os.getpid(), 0
        found = _last.file[_last.used : _last.used + size]
        _last.used += -(-size // 64) * 64
    return found.view(of).reshape(shape)


class _Last:
    """The file that arrays are taken from, how much of it is taken, and the process that does."""

    pid, used = -1, 0
    file = np.zeros(0, np.uint8)


_last, _lock = _Last(), threading.Lock()


def _file(size: int) -> NDArray[np.uint8]:
    """Return so many zeros that are mapped from a new file."""
    try:
        with tempfile.TemporaryFile(prefix="bgen-") as file:
            if sys.platform == "darwin":  # which has no such call
                file.truncate(size)
            else:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk says so now, and not by a signal
            return np.asarray(np.memmap(file, np.uint8, "r+", shape=(size,)))
    except OSError as error:
        raise no_room(size, error) from None


def no_room(size: int, error: OSError) -> Unreachable:
    """Return the error for numbers of cells that cannot be written."""
    return Unreachable(
        f"Numbers of cells, {size / 1e6:,.0f} MB, cannot be written into {tempfile.gettempdir()} ({error}). Make room"
        " there, or name another folder in the environment variable TMPDIR."
    )


def fill(n: int, dtype: DTypeLike, values: Callable[[slice], NDArray[Any]]) -> NDArray[Any]:
    """Return an array ``[n]`` that is computed a part at a time."""
    out = room(n, dtype)
    for part in parts(n):
        out[part] = values(part)
    return out


def chosen(values: NDArray[Any], keep: NDArray[np.bool_]) -> NDArray[Any]:
    """Return ``values[keep]``; the values themselves where all are kept."""
    kept = int(np.count_nonzero(keep))
    if kept == len(values):
        return values
    out = room(kept, values.dtype)
    at = 0
    for part in parts(len(values)):
        some = values[part][keep[part]]
        out[at : at + len(some)] = some
        at += len(some)
    return out


def median(n: int, values: Callable[[slice], NDArray[Any]]) -> float:
    """Return the median of what is computed of ``n`` cells a part at a time, as ``np.median`` gives it."""
    return float(np.median(gathered(n, values), overwrite_input=True))


def gathered(n: int, values: Callable[[slice], NDArray[Any]]) -> NDArray[np.float64]:
    """Return what is computed of ``n`` cells a part at a time, one after another; it may be less than a value each."""
    out, at = room(n, np.float64), 0
    for part in parts(n):
        some = values(part)
        out[at : at + len(some)] = some
        at += len(some)
    return out[:at]
