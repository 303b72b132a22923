"""Barcodes of very many cells: UTF-8 in files without a name, and those that occur more than once.

Axes: N texts.
"""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from bgen.arrays import I64, U8, U64
from bgen.order import groups
from data_tools.cells.mapped import fill, no_room, room


class Texts:
    """Texts that are added a part at a time, and read by number."""

    def __init__(self) -> None:
        self._bytes, self._ends = _Growing(np.uint8), _Growing(np.int64)

    def __len__(self) -> int:
        return self._ends.n

    def __getitem__(self, number: int) -> str:
        start = int(self._ends.array[number - 1]) if number else 0
        return self._bytes.array[start : int(self._ends.array[number])].tobytes().decode("utf-8", "surrogatepass")

    def append(self, texts: NDArray[Any]) -> None:
        """Add a part: objects, all of them str.

        Raises
        ------
        Unreachable
            If there is no room for them.
        """
        line = "".join(texts)
        if line.isascii():
            sizes = np.fromiter(map(len, texts), np.int64, len(texts))
        else:
            sizes = np.fromiter((len(text.encode("utf-8", "surrogatepass")) for text in texts), np.int64, len(texts))
        self._ends.append(self._bytes.n + np.cumsum(sizes))
        self._bytes.append(np.frombuffer(line.encode("utf-8", "surrogatepass"), np.uint8))

    def cut(self, n: int) -> None:
        """Forget all but the first ``n``."""
        self._bytes.cut(int(self._ends.array[n - 1]) if n else 0)
        self._ends.cut(n)

    def sizes(self, rows: slice | I64) -> I64:
        """Return the bytes of some texts."""
        ends = self._ends.array
        if isinstance(rows, slice):
            return np.diff(ends[rows], prepend=ends[rows.start - 1] if rows.start else 0)
        return ends[rows] - np.where(rows > 0, ends[rows - 1], 0)

    def write(self, rows: I64, out: U8, at: I64) -> None:
        """Write some texts into uint8 ``[n, width]``, from a place of each row on; none may be longer."""
        if len(rows) and int((at + self.sizes(rows)).max()) > out.shape[1]:
            raise ValueError("a text does not fit")
        _copy(self._bytes.array, self._ends.array, rows, out, at)

    def repeated(self, rows: slice) -> tuple[int, int, list[str]]:
        """Look for texts that occur more than once among consecutive ones.

        Texts are compared by 64-bit hashes, and whole where hashes are the same.

        Returns
        -------
        tuple
            How many texts are as one before them; how many different texts these are; the first three of those, in the
            order of their second occurrence.
        """
        first, n = rows.start, rows.stop - rows.start
        data, ends = self._bytes.array, self._ends.array
        hashes = fill(n, np.uint64, lambda part: _hash(data, ends, first + part.start, first + part.stop))
        extra = distinct = 0
        seconds: list[int] = []
        for some in ranges(n, lambda part: hashes[part]):
            found = hashes[some]
            order = np.argsort(found, kind="stable")
            same = found[order][1:] == found[order][:-1]
            line = first + some[order]
            del found, order
            pairs = np.flatnonzero(same)
            if not len(pairs):
                continue
            if not _alike(data, ends, line[pairs], line[pairs + 1]):
                line, same = self._by_text(line, same)
                pairs = np.flatnonzero(same)
            begins = pairs[(pairs == 0) | ~same[pairs - 1]]
            extra, distinct = extra + len(pairs), distinct + len(begins)
            here = line[begins + 1]
            seconds = sorted([*seconds, *np.sort(here)[:3].tolist()])[:3]
        return extra, distinct, [self[number] for number in seconds]

    def _by_text(self, line: I64, same: NDArray[np.bool_]) -> tuple[I64, NDArray[np.bool_]]:
        """Return lines of texts and whether each is as the one before, where different ones have the same hash."""
        group = np.concatenate([[0], np.cumsum(~same)])
        often = np.flatnonzero(np.bincount(group)[group] > 1)
        keys = [(int(group[at]), self[int(line[at])], int(line[at])) for at in often]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        alike = [keys[one][:2] == keys[two][:2] for one, two in itertools.pairwise(order)]
        return line[often[order]], np.array(alike, bool)


def ranges(n: int, hashes: Callable[[slice], U64]) -> Iterator[I64]:
    """Yield the numbers of ``n`` things by consecutive ranges of their hashes, ascending within each.

    A range has about :data:`bgen.order.groups.PART` things, if not many have one hash.
    """
    bits = (n // groups.PART).bit_length()
    if not bits:
        yield np.arange(n)
        return
    shift = np.uint64(64 - bits)
    sizes = np.zeros(1 << bits, np.int64)
    for part in groups.parts(n):
        sizes += np.bincount((hashes(part) >> shift).astype(np.int64), minlength=len(sizes))
    edges = np.concatenate([[0], np.cumsum(sizes)])
    line, at = room(n, np.int64), edges[:-1].copy()
    for part in groups.parts(n):
        groups.place((hashes(part) >> shift).astype(np.int64), np.arange(part.start, part.stop), at, line)
    for start, stop in itertools.pairwise(edges.tolist()):
        yield line[start:stop]


class _Growing:
    """A file without a name that numbers are appended to."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._dtype = np.dtype(dtype)
        try:
            with tempfile.TemporaryFile(prefix="bgen-") as file:
                self._handle = os.dup(file.fileno())
        except OSError as error:
            raise no_room(0, error) from None
        weakref.finalize(self, os.close, self._handle)
        self.n = 0
        self._mapped: NDArray[Any] | None = None

    def append(self, values: NDArray[Any]) -> None:
        data = memoryview(np.ascontiguousarray(values, self._dtype).view(np.uint8).data)
        done, start = 0, self.n * self._dtype.itemsize
        try:
            while done < len(data):
                done += os.pwrite(self._handle, data[done:], start + done)
        except OSError as error:
            raise no_room(len(data), error) from None
        self.n += len(values)
        self._mapped = None

    def cut(self, n: int) -> None:
        self._mapped = None
        self.n = n
        os.truncate(self._handle, n * self._dtype.itemsize)

    @property
    def array(self) -> NDArray[Any]:
        if self._mapped is None:
            size = self.n * self._dtype.itemsize
            held = mmap.mmap(self._handle, size, prot=mmap.PROT_READ) if size else b""
            self._mapped = np.frombuffer(held, self._dtype)
        return self._mapped


@numba.njit(cache=True, nogil=True)
def _hash(data: U8, ends: I64, first: int, last: int) -> U64:
    """Return uint64 ``[last - first]``: FNV-1a of each text, mixed at the end as splitmix64 does."""
    out = np.empty(last - first, np.uint64)
    for number in range(first, last):
        value = np.uint64(0xCBF29CE484222325)
        for at in range(ends[number - 1] if number else 0, ends[number]):
            value = (value ^ np.uint64(data[at])) * np.uint64(0x100000001B3)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out[number - first] = value ^ (value >> np.uint64(31))
    return out


@numba.njit(cache=True, nogil=True)
def _alike(data: U8, ends: I64, ones: I64, others: I64) -> bool:
    """Whether every text is the same as another one."""
    for i in range(len(ones)):
        a = ends[ones[i] - 1] if ones[i] else 0
        b = ends[others[i] - 1] if others[i] else 0
        size = ends[ones[i]] - a
        if ends[others[i]] - b != size:
            return False
        for k in range(size):
            if data[a + k] != data[b + k]:
                return False
    return True


@numba.njit(cache=True, nogil=True)
def _copy(data: U8, ends: I64, rows: I64, out: U8, at: I64) -> None:
    for i in range(len(rows)):
        start = ends[rows[i] - 1] if rows[i] else 0
        for place in range(start, ends[rows[i]]):
            out[i, at[i] + place - start] = data[place]
