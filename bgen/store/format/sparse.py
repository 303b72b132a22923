"""What must hold of a sparse matrix that others wrote, before anything compiled reads it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

POINTER_ROWS = 1 << 22
"""Rows of which a pointer is read at a time."""


def plain(values: Any) -> NDArray[Any]:
    """Return values in a type that the compiled loops know: native bytes; float16 becomes float32.

    Raises
    ------
    ValueError
        If they are no numbers.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"it holds {array.dtype}, not numbers")
    if array.dtype.kind == "f" and array.dtype.itemsize not in (4, 8):
        return array.astype(np.float32 if array.dtype.itemsize < 4 else np.float64)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def require_columns(indices: NDArray[Any], n: int) -> None:
    """Check that the numbers of a sparse matrix's columns (of a CSC one: its rows) are below ``n``.

    Raises
    ------
    ValueError
        If they are not.
    """
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n:
        raise ValueError(
            f"it has numbers of genes or cells from {int(indices.min())} to {int(indices.max())}, not from 0 to {n - 1}"
        )


def read_pointer(group: Any, n: int) -> NDArray[np.int64]:
    """Return ``indptr`` of a stored sparse matrix with ``n`` rows (of a CSC one: columns), int64 ``[n + 1]``.

    Raises
    ------
    ValueError
        If it does not fit the matrix.
    """
    return Pointer(group, n).window(0, n)


class Pointer:
    """``indptr`` of a stored sparse matrix with ``n`` rows (of a CSC one: columns), read a part at a time.

    Raises
    ------
    ValueError
        If it does not fit the matrix.
    """

    def __init__(self, group: Any, n: int) -> None:
        self._stored, self._indptr = _require_parts(group, n), group["indptr"]
        self._n, self._start = n, 0
        self._read = np.zeros(0, np.int64)

    def window(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return int64 ``[stop - start + 1]``: where rows begin, and where the last one ends.

        Raises
        ------
        ValueError
            If the entries do not ascend from 0 to at most the number of stored values.
        """
        if not self._start <= start <= stop < self._start + len(self._read):
            end = min(max(stop, start + POINTER_ROWS), self._n)
            self._start, self._read = start, np.zeros(0, np.int64)
            self._read = require_pointer(np.asarray(self._indptr[start : end + 1]), self._stored, whole=start == 0)
        return self._read[start - self._start : stop - self._start + 1]


def _require_parts(group: Any, n: int) -> int:
    """Return how many values a sparse matrix stores, whose parts fit each other."""
    parts = [group[name] for name in ("indptr", "indices", "data")]
    if any(len(part.shape) != 1 for part in parts) or any(part.dtype.kind not in "iu" for part in parts[:2]):
        raise ValueError("its parts are no lists of numbers")
    indptr = parts[0]
    if indptr.shape[0] != n + 1 or parts[1].shape != parts[2].shape:
        raise ValueError(
            f"its indptr has {indptr.shape[0]} entries for {n} rows, indices {parts[1].shape[0]} and data"
            f" {parts[2].shape[0]}"
        )
    return int(parts[1].shape[0])


def require_pointer(indptr: NDArray[Any], stored: int, *, whole: bool = True) -> NDArray[np.int64]:
    """Return ``indptr`` of a sparse matrix with so many stored values as int64; or a later part of it.

    Raises
    ------
    ValueError
        If it does not ascend from 0 to at most ``stored``.
    """
    places = indptr.astype(np.int64, copy=False)
    if (places[0] != 0 if whole else places[0] < 0) or places[-1] > stored or (np.diff(places) < 0).any():
        raise ValueError("its indptr does not ascend from 0 to the number of stored values")
    return places
