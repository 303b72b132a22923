"""The codec's inner loops for building: from rows of an input to streams, and from streams to other gene numbers.

Both collect a cell's counts by gene: ``line[gene]`` holds the count and a bit of ``words`` says that it does, so that
genes come out in ascending order without sorting, at a cost of one step per entry and one per 64 genes.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from bgen.arrays import I64, U8
from bgen.store.format.codec import ESCAPE


def _lowest_bit(typingctx: Any, word: Any) -> Any:
    """Return the number of the lowest bit of a uint64 that is set; there must be one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


lowest_bit: Any = intrinsic(_lowest_bit)


@numba.njit(cache=True, nogil=True)
def encode_rows(
    indptr: I64,
    columns: NDArray[np.integer[Any]],
    values: NDArray[np.uint32],
    gene_map: I64,
    wanted: NDArray[np.bool_],
    expressed: I64,
    gaps: U8,
    counts: U8,
    overflow: NDArray[np.uint32],
    sizes: I64,
) -> int:
    """Write rows of an input as streams, one cell after the other.

    Parameters
    ----------
    indptr, columns, values
        Rows of the input; columns of the same gene are added up.
    gene_map
        int64 ``[M]``: gene of each column, -1 = none.
    wanted
        bool: which of the rows to write.
    expressed
        int64 ``[G]``: cells that express each gene, added to.
    gaps, counts, overflow
        Written, and large enough: ``gaps`` needs a byte for each entry and G / 255 bytes for each row.
    sizes
        int64 ``[rows, 3]``, written: bytes of gaps, bytes of counts and entries of overflow of each row.

    Returns
    -------
    int
        The first row with a count that 32 bits do not hold, or -1.
    """
    n_genes = len(expressed)
    line = np.zeros(n_genes, np.uint64)
    words = np.zeros(n_genes // 64 + 1, np.uint64)
    g = c = o = 0
    for row in range(len(indptr) - 1):
        if not wanted[row]:
            continue
        g0, c0, o0 = g, c, o
        for k in range(indptr[row], indptr[row + 1]):
            gene = gene_map[columns[k]]
            if gene >= 0 and values[k] > 0:
                line[gene] += np.uint64(values[k])
                words[gene >> 6] |= np.uint64(1) << np.uint64(gene & 63)
        previous = -1
        for w in range(len(words)):
            while words[w]:
                gene = np.int64(64) * w + lowest_bit(words[w])
                words[w] &= words[w] - np.uint64(1)
                gap = gene - previous - 1
                previous = gene
                while gap >= ESCAPE:
                    gaps[g] = ESCAPE
                    gap -= ESCAPE
                    g += 1
                gaps[g] = gap
                g += 1
                value = line[gene]
                line[gene] = 0
                expressed[gene] += 1
                if value < np.uint64(ESCAPE):
                    counts[c] = value
                else:
                    if value > np.uint64(0xFFFFFFFF):
                        return row
                    counts[c] = ESCAPE
                    overflow[o] = value
                    o += 1
                c += 1
        sizes[row, 0], sizes[row, 1], sizes[row, 2] = g - g0, c - c0, o - o0
    return -1


@numba.njit(cache=True, nogil=True)
def recoded_gap_bytes(gaps: U8, starts: I64, rank: NDArray[np.int32]) -> NDArray[np.uint32]:
    """Return uint32: the bytes of gaps of each cell once gene ``g`` has the number ``rank[g]``.

    ``starts`` is int64 ``[cells + 1]``: where each cell's gaps begin.
    """
    words = np.zeros(len(rank) // 64 + 1, np.uint64)
    found = np.zeros(len(starts) - 1, np.uint32)
    for cell in range(len(found)):
        gene = np.int64(-1)
        for k in range(starts[cell], starts[cell + 1]):
            gene += gaps[k]
            if gaps[k] != ESCAPE:
                gene += 1
                to = rank[gene]
                words[to >> 6] |= np.uint64(1) << np.uint64(to & 63)
        previous = np.int64(-1)
        total = 0
        for w in range(len(words)):
            while words[w]:
                gene = np.int64(64) * w + lowest_bit(words[w])
                words[w] &= words[w] - np.uint64(1)
                total += 1 + (gene - previous - 1) // ESCAPE
                previous = gene
        found[cell] = total
    return found


@numba.njit(cache=True, nogil=True)
def recode_chunks(
    gaps: U8,
    counts: U8,
    overflow: NDArray[np.uint32],
    cells: I64,
    first_cell: I64,
    rank: NDArray[np.int32],
    gaps_out: U8,
    counts_out: U8,
) -> None:
    """Write cells into chunks, with gene ``g`` under the number ``rank[g]``.

    Parameters
    ----------
    gaps, counts, overflow
        Streams that hold the cells in any order.
    cells
        int64 ``[cells, 4]``: where each cell's gaps, counts and overflow begin, and its bytes of counts.
    first_cell
        int64 ``[chunks + 1]``: first of the ``cells`` in each chunk.
    gaps_out, counts_out
        uint8 ``[chunks, room]``, zeroed; written as :func:`bgen.store.format.codec.encode_chunk` writes them.
    """
    line = np.zeros(len(rank), np.uint32)
    words = np.zeros(len(rank) // 64 + 1, np.uint64)
    for chunk in range(len(first_cell) - 1):
        at = slot = 0
        entries = np.int64(0)
        for cell in range(first_cell[chunk], first_cell[chunk + 1]):
            entries += cells[cell, 3]
        tail = -(-entries // 4) * 4
        for cell in range(first_cell[chunk], first_cell[chunk + 1]):
            g, o = cells[cell, 0], cells[cell, 2]
            gene = np.int64(-1)
            for k in range(cells[cell, 1], cells[cell, 1] + cells[cell, 3]):
                while gaps[g] == ESCAPE:
                    gene += ESCAPE
                    g += 1
                gene += np.int64(gaps[g]) + 1
                g += 1
                to = rank[gene]
                words[to >> 6] |= np.uint64(1) << np.uint64(to & 63)
                line[to] = counts[k]
                if counts[k] == ESCAPE:
                    line[to] = overflow[o]
                    o += 1
            previous = np.int64(-1)
            for w in range(len(words)):
                while words[w]:
                    gene = np.int64(64) * w + lowest_bit(words[w])
                    words[w] &= words[w] - np.uint64(1)
                    gap = gene - previous - 1
                    previous = gene
                    while gap >= ESCAPE:
                        gaps_out[chunk, at] = ESCAPE
                        gap -= ESCAPE
                        at += 1
                    gaps_out[chunk, at] = gap
                    at += 1
                    value = line[gene]
                    if value < ESCAPE:
                        counts_out[chunk, slot] = value
                    else:
                        counts_out[chunk, slot] = ESCAPE
                        for byte in range(4):
                            counts_out[chunk, tail] = (value >> np.uint32(8 * byte)) & np.uint32(255)
                            tail += 1
                    slot += 1


@numba.njit(cache=True, nogil=True)
def gather(stream: U8, starts: I64, sizes: I64, out: U8) -> None:
    """Copy ``stream[starts[i] : starts[i] + sizes[i]]`` one after the other into ``out``."""
    at = 0
    for i in range(len(starts)):
        for k in range(sizes[i]):
            out[at + k] = stream[starts[i] + k]
        at += sizes[i]
