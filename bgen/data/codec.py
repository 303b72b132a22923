"""How a cell's counts become two byte streams and back (DESIGN, section 6).

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

ESCAPE = 255
"""In gaps: add 255 and go on. In counts: look in the overflow."""

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]

PROFILES: dict[str, list[dict[str, Any]]] = {
    # for networks and disks: a third of the bytes of a usual sparse store
    "small": [{"name": "zstd", "configuration": {"level": 1, "checksum": False}}],
    # for local NVMe: larger, decodes faster
    "fast": [
        {
            "name": "blosc",
            "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "noshuffle", "typesize": 1, "blocksize": 0},
        }
    ],
}
"""Codec profiles: how the bytes of a chunk are compressed. Every chunk also carries a CRC-32C."""


def overflow_start(n_counts: I64) -> I64:
    """Return the byte of a chunk at which its overflow begins, after ``n_counts`` bytes of counts."""
    return -(-n_counts // 4) * 4


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
def decode_rows(
    gaps: U8,
    counts: U8,
    gap_start: I64,
    count_start: I64,
    overflow_start: I64,
    out_start: I64,
    indptr: I64,
    indices_out: NDArray[np.int32],
    counts_out: NDArray[np.float32],
) -> None:
    """Decode rows of a window of chunks into CSR.

    Parameters
    ----------
    gaps, counts
        Bytes of the window's chunks, flat.
    gap_start, count_start, overflow_start
        int64 ``[R]``: where each row's gaps, counts and overflow begin in them.
    out_start
        int64 ``[R]``: number of each row in the batch.
    indptr
        int64 ``[B + 1]`` of the batch; row ``r`` has ``indptr[out_start[r] + 1] - indptr[out_start[r]]`` entries.
    indices_out, counts_out
        ``[NNZ]`` of the batch, written in place.
    """
    for r in range(len(gap_start)):
        g = gap_start[r]
        c = count_start[r]
        o = overflow_start[r]
        gene = -1
        for k in range(indptr[out_start[r]], indptr[out_start[r] + 1]):
            while gaps[g] == ESCAPE:
                gene += ESCAPE
                g += 1
            gene += gaps[g] + 1
            g += 1
            indices_out[k] = gene
            count = counts[c]
            c += 1
            if count < ESCAPE:
                counts_out[k] = count
            else:
                value = np.int64(0)
                for byte in range(4):
                    value |= np.int64(counts[o + byte]) << (8 * byte)
                o += 4
                counts_out[k] = value
