"""How a cell's counts become two byte streams and back.

Genes are numbered in order of how many cells express them. A cell with expressed genes ``g_0 < g_1 < ...`` and counts
``x_0, x_1, ...`` is

* **gaps**: ``g_i - g_{i-1} - 1`` (with ``g_{-1} = -1``) as uint8; a gap of 255 or more is written as bytes 255, each of
  which means "add 255 and go on", and then the rest;
* **counts**: ``x_i`` as uint8; 255 means "the next entry of the overflow", where the count stands as uint32.

A **chunk** is one row of each of the two zarr arrays: the streams of whole cells one after the other, then, in the
counts, the chunk's overflow from the next multiple of 4 bytes on, then zeros.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from bgen.arrays import I64, U8
from bgen.store.format.memcpy import copy_bytes

ESCAPE = 255
"""In gaps: add 255 and go on. In counts: look in the overflow."""


CHUNK_SLACK = 1 << 20
"""Bytes that a chunk may have beyond what its cells need."""

PROFILES: dict[str, list[dict[str, Any]]] = {
    # for networks and disks: a third of the bytes of a usual sparse store
    "small": [{"name": "zstd", "configuration": {"level": 1, "checksum": False}}],
    # for local NVMe: larger, decodes faster
    "fast": [
        {
            "name": "blosc",
            "configuration": {"cname": "lz4hc", "clevel": 5, "shuffle": "noshuffle", "typesize": 1, "blocksize": 0},
        }
    ],
}
"""Codec profiles: how the bytes of a chunk are compressed. Every chunk also carries a CRC-32C."""


@numba.njit(cache=True, nogil=True)
def stream_sizes(indptr: I64, indices: NDArray[np.int32], counts: NDArray[np.uint32]) -> tuple[I64, I64]:
    """Return per cell the bytes of gaps and the entries of overflow of a CSR matrix with ascending indices."""
    n = len(indptr) - 1
    gap_bytes = np.zeros(n, np.int64)
    overflow = np.zeros(n, np.int64)
    for cell in range(n):
        previous = -1
        for k in range(indptr[cell], indptr[cell + 1]):
            gap_bytes[cell] += 1 + (indices[k] - previous - 1) // ESCAPE
            previous = indices[k]
            if counts[k] >= ESCAPE:
                overflow[cell] += 1
    return gap_bytes, overflow


@numba.njit(cache=True, nogil=True)
def encode_chunk(
    indptr: I64, indices: NDArray[np.int32], counts: NDArray[np.uint32], gaps_out: U8, counts_out: U8
) -> None:
    """Write the cells of a CSR matrix into the (zeroed) rows ``gaps_out`` and ``counts_out`` of one chunk."""
    n = len(indptr) - 1
    at = 0
    base = indptr[0]
    tail = -(-(indptr[n] - base) // 4) * 4
    for cell in range(n):
        previous = -1
        for k in range(indptr[cell], indptr[cell + 1]):
            gap = indices[k] - previous - 1
            previous = indices[k]
            while gap >= ESCAPE:
                gaps_out[at] = ESCAPE
                gap -= ESCAPE
                at += 1
            gaps_out[at] = gap
            at += 1
            count = counts[k]
            if count < ESCAPE:
                counts_out[k - base] = count
            else:
                counts_out[k - base] = ESCAPE
                for byte in range(4):
                    counts_out[tail] = (count >> (8 * byte)) & 255
                    tail += 1


@numba.njit(cache=True, nogil=True)
def locate_rows(
    cells: I64,
    chunks: I64,
    slots: I64,
    first_cell: I64,
    nonzeros: NDArray[np.unsignedinteger[Any]],
    gap_bytes: NDArray[np.unsignedinteger[Any]],
    overflow: NDArray[np.unsignedinteger[Any]],
    gap_room: int,
    count_room: int,
) -> I64:
    """Find cells in an arena of chunks.

    Parameters
    ----------
    cells
        int64 ``[R]``: numbers of cells in these chunks, in any order.
    chunks
        int64 ``[W]``: numbers of the chunks, in any order.
    slots
        int64 ``[W]``: the slot of the arena that each chunk lies in.
    first_cell
        int64 ``[n_chunks + 1]`` of the store.
    nonzeros, gap_bytes, overflow
        Unsigned ``[n_cells]`` of the store: entries of each cell, its bytes of gaps, its counts of 255 and more.
    gap_room, count_room
        Bytes of a chunk in the two streams.

    Returns
    -------
    int64 ``[R, 6]``
        For each cell: where its gaps begin and how many bytes they are, then the same for its counts, then where its
        overflow begins and how many entries it has.
    """
    order = np.argsort(chunks)
    firsts = first_cell[chunks[order]]
    # where each cell of the window lies within its chunk
    begins = np.zeros(len(chunks) + 1, np.int64)
    for w in range(len(chunks)):
        begins[w + 1] = begins[w] + first_cell[chunks[w] + 1] - first_cell[chunks[w]]
    starts = np.empty((begins[-1], 3), np.int64)
    for w in range(len(chunks)):
        gaps = counts = spill = np.int64(0)
        first = first_cell[chunks[w]]
        for i in range(begins[w + 1] - begins[w]):
            starts[begins[w] + i, 0] = gaps
            starts[begins[w] + i, 1] = counts
            starts[begins[w] + i, 2] = spill
            gaps += np.int64(gap_bytes[first + i])
            counts += np.int64(nonzeros[first + i])
            spill += 4 * np.int64(overflow[first + i])
        tail = -(-counts // 4) * 4
        for i in range(begins[w], begins[w + 1]):
            starts[i, 0] += slots[w] * gap_room
            starts[i, 1] += slots[w] * count_room
            starts[i, 2] += slots[w] * count_room + tail
    found = np.empty((len(cells), 6), np.int64)
    for r in range(len(cells)):
        cell = cells[r]
        low, high = 0, len(firsts)
        while high - low > 1:
            middle = (low + high) // 2
            if firsts[middle] <= cell:
                low = middle
            else:
                high = middle
        at = starts[begins[order[low]] + cell - firsts[low]]
        found[r, 0] = at[0]
        found[r, 1] = gap_bytes[cell]
        found[r, 2] = at[1]
        found[r, 3] = nonzeros[cell]
        found[r, 4] = at[2]
        found[r, 5] = overflow[cell]
    return found


def find_wrong_sizes(
    first_cell: I64,
    nonzeros: NDArray[np.unsignedinteger[Any]],
    gap_bytes: NDArray[np.unsignedinteger[Any]],
    overflow: NDArray[np.unsignedinteger[Any]],
    n_genes: int,
    gap_room: int,
    count_room: int,
) -> str:
    """Say what is wrong with the sizes of a store's cells, or return an empty string.

    The loops of this module check nothing: they rely on sizes for which this returns an empty string, and on rows for
    which :func:`find_bad_row` returns -1. The parameters are those of :func:`locate_rows`.
    """
    if not (first_cell[0] == 0 and first_cell[-1] == len(nonzeros) and (np.diff(first_cell) > 0).all()):
        return "the chunks do not hold the cells one after the other"
    problem, sums, largest, fullest = _add_up(first_cell, nonzeros, gap_bytes, overflow, n_genes)
    if problem == 1:
        return "a cell has more counts than genes"
    if problem == 2:
        return "the gaps of a cell take a number of bytes that is not possible"
    if fullest[0] > gap_room or fullest[1] > count_room:
        return "a chunk holds more bytes than it has room for"
    # a chunk has room for 256 usual cells, or for the largest one
    weighed = [times * size for times, size in zip((1, 1, 4), sums.tolist(), strict=True)]
    most = CHUNK_SLACK + sum(300 * size // len(nonzeros) for size in weighed)
    most += int(largest[0] + largest[1] + 4 * largest[2])
    if max(gap_room, count_room) > most:
        return "a chunk has more room than its cells need"
    return ""


@numba.njit(cache=True, nogil=True)
def _add_up(
    first_cell: I64,
    nonzeros: NDArray[np.unsignedinteger[Any]],
    gap_bytes: NDArray[np.unsignedinteger[Any]],
    overflow: NDArray[np.unsignedinteger[Any]],
    n_genes: int,
) -> tuple[int, I64, I64, I64]:
    """Look at every cell's sizes, without a copy of them.

    Returns
    -------
    int
        0; 1: more counts than genes, or more large counts than counts; 2: a number of gaps that is not possible.
    I64, I64, I64
        Sums, and largest of a cell, of gaps, counts and overflow; most bytes of a chunk in the two streams.
    """
    sums, largest, fullest = np.zeros(3, np.int64), np.zeros(3, np.int64), np.zeros(2, np.int64)
    problem = 0
    for chunk in range(len(first_cell) - 1):
        gaps = counts = spilt = np.int64(0)
        for cell in range(first_cell[chunk], first_cell[chunk + 1]):
            g, n, o = np.int64(gap_bytes[cell]), np.int64(nonzeros[cell]), np.int64(overflow[cell])
            if n > n_genes or o > n:
                problem = 1
            elif problem == 0 and (g < n or g > n + n_genes // ESCAPE):
                problem = 2
            largest[0], largest[1], largest[2] = max(largest[0], g), max(largest[1], n), max(largest[2], o)
            gaps, counts, spilt = gaps + g, counts + n, spilt + o
        sums[0], sums[1], sums[2] = sums[0] + gaps, sums[1] + counts, sums[2] + spilt
        fullest[0] = max(fullest[0], gaps)
        fullest[1] = max(fullest[1], -(-counts // 4) * 4 + 4 * spilt)
    return problem, sums, largest, fullest


@numba.njit(cache=True, nogil=True)
def find_bad_row(gaps: U8, counts: U8, rows: I64, n_genes: int) -> int:
    """Return the first of some rows of an arena that does not decode into the genes of a cell, or -1.

    Parameters
    ----------
    gaps, counts
        Bytes of the arena, flat.
    rows
        int64 ``[R, 6]``: where they lie (see :func:`locate_rows`).
    n_genes
        Genes of the store.
    """
    for r in range(len(rows)):
        if not _is_cell(gaps, counts, rows[r], n_genes):
            return r
    return -1


@numba.njit(cache=True, nogil=True)
def _is_cell(gaps: U8, counts: U8, row: I64, n_genes: int) -> bool:
    """Whether a row of an arena decodes into the genes of a cell (see :func:`find_bad_row`)."""
    begin, end = row[0], row[0] + row[1]
    escapes, total = _escapes_and_sum(gaps, begin, end)
    entries = end - begin - escapes
    if entries != row[3] or total + entries > n_genes or (end > begin and gaps[end - 1] == ESCAPE):
        return False
    return _escapes_and_sum(counts, row[2], row[2] + entries)[0] == row[5]


@numba.njit(cache=True, nogil=True)
def _escapes_and_sum(stream: U8, begin: Any, end: Any) -> tuple[Any, Any]:
    """Return how many bytes of a part are escapes, and the sum of all.

    256 bytes add up to less than 2^16. Sums of that size take a third of the time of those of 64 bits.
    """
    escapes, total = np.int64(0), np.int64(0)
    at = begin
    while at < end:
        stop = min(at + 256, end)
        few, some = np.uint16(0), np.uint16(0)
        for k in range(np.uint64(at), np.uint64(stop)):
            few = np.uint16(few + np.uint16(stream[k] == ESCAPE))
            some = np.uint16(some + np.uint16(stream[k]))
        escapes += np.int64(few)
        total += np.int64(some)
        at = stop
    return escapes, total


@numba.njit(cache=True, nogil=True)
def copy_rows(
    gaps: U8,
    counts: U8,
    rows: I64,
    n_genes: int,
    gaps_out: U8,
    counts_out: U8,
    overflow_out: NDArray[np.int32],
    at: I64,
) -> int:
    """Copy rows of an arena, one after the other, into a packed batch; each is looked at before, as cheap as that is.

    Parameters
    ----------
    gaps, counts
        Bytes of the arena, flat.
    rows
        int64 ``[R, 6]``: where they lie (see :func:`locate_rows`).
    n_genes
        Genes of the store.
    gaps_out, counts_out, overflow_out
        The batch's streams.
    at
        int64 ``[3]``: how much of each is filled already; updated.

    Returns
    -------
    int
        The first row that does not decode into the genes of a cell, at which copying ends; or -1.
    """
    g, c, o = at
    for r in range(len(rows)):
        if not _is_cell(gaps, counts, rows[r], n_genes):
            return r
        begin, size = rows[r, 0], rows[r, 1]
        copy_bytes(gaps_out, g, gaps, begin, size)
        g += size
        begin, size = rows[r, 2], rows[r, 3]
        copy_bytes(counts_out, c, counts, begin, size)
        c += size
        begin = rows[r, 4]
        for k in range(rows[r, 5]):
            value = np.uint32(0)
            for byte in range(4):
                value |= np.uint32(counts[begin + 4 * k + byte]) << np.uint32(8 * byte)
            overflow_out[o] = value
            o += 1
    at[0], at[1], at[2] = g, c, o
    return -1


@numba.njit(cache=True, nogil=True)
def unpack_rows(
    gaps: U8,
    counts: U8,
    overflow: NDArray[np.int32],
    gap_start: I64,
    indices_out: NDArray[np.int32],
    counts_out: NDArray[np.float32],
) -> None:
    """Decode a packed batch into CSR indices and counts.

    Parameters
    ----------
    gaps, counts, overflow
        The batch's streams.
    gap_start
        int64 ``[B + 1]``: where each cell's gaps begin.
    indices_out, counts_out
        ``[NNZ]``, written.
    """
    k: Any = np.uint64(0)
    for row in range(len(gap_start) - 1):
        k = unpack_row(gaps, gap_start[row], gap_start[row + 1], indices_out, k)
    unpack_counts(counts, overflow, counts_out)


@numba.njit(cache=True, nogil=True)
def unpack_row(gaps: U8, start: int, stop: int, genes_out: NDArray[np.int32], k: Any) -> Any:
    """Decode the gaps ``start:stop`` of one cell into gene numbers from place ``k`` on; return the place after them."""
    gene = np.int32(-1)
    for g in range(np.uint64(start), np.uint64(stop)):
        # no branch: after an escape the next gene goes to the same place
        gap = gaps[g]
        is_entry = np.int32(gap != ESCAPE)
        gene += np.int32(gap) + is_entry
        genes_out[k] = gene
        k += np.uint64(is_entry)
    return k


@numba.njit(cache=True, nogil=True)
def unpack_counts(counts: U8, overflow: NDArray[np.int32], counts_out: NDArray[np.float32]) -> int:
    """Decode counts, some cells' or a whole batch's; return how many entries of the overflow they took."""
    o = 0
    at = 0
    while at < len(counts):
        end = min(at + 256, len(counts))
        largest = np.uint8(0)
        for k in range(np.uint64(at), np.uint64(end)):
            largest = max(largest, counts[k])
            counts_out[k] = np.float32(counts[k])
        if largest == ESCAPE:  # so in a few blocks of a hundred
            for k in range(at, end):
                if counts[k] == ESCAPE:
                    counts_out[k] = np.uint32(overflow[o])
                    o += 1
        at = end
    return o


@numba.njit(cache=True, nogil=True)
def unpack_dense(
    gaps: U8,
    counts: U8,
    overflow: NDArray[np.int32],
    gap_start: I64,
    indptr: I64,
    dense_out: NDArray[np.float32],
) -> None:
    """Decode a packed batch into dense rows, ``[B, G]``, written; the other parameters as of :func:`unpack_rows`."""
    o = 0
    genes = np.empty(dense_out.shape[1] + 1, np.int32)
    values = np.empty(dense_out.shape[1] + 1, np.float32)
    for row in range(len(gap_start) - 1):
        unpack_row(gaps, gap_start[row], gap_start[row + 1], genes, np.uint64(0))
        o += unpack_counts(counts[indptr[row] : indptr[row + 1]], overflow[o:], values)
        line = dense_out[row]
        line[:] = 0.0
        for k in range(indptr[row + 1] - indptr[row]):
            line[genes[k]] = values[k]
