"""A batch as it lies in the store: two bytes an entry, to be unpacked where it is needed.

A packed batch is a quarter of the bytes of a CSR one, so it is what should travel to the device. Unpacking is written
twice: in plain torch, for any device, and in numba, which is faster on a CPU.

Axes: B cells of the batch, G genes of the store, NNZ stored counts, E bytes of gaps, O counts of 255 and more.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bgen.data.batch import CellBatch
from bgen.data.buffers import Pool
from bgen.store.format.codec import ESCAPE, unpack_dense, unpack_rows


@dataclass
class PackedBatch:
    """Counts of B cells in the store's encoding (:mod:`bgen.store.format.codec`).

    Attributes
    ----------
    gaps
        uint8 ``[E]``: gaps between the gene numbers of a cell, 255 = add 255 and go on.
    counts
        uint8 ``[NNZ]``: counts, 255 = the next entry of ``overflow``.
    overflow
        int32 ``[O]``: counts of 255 and more, as the bits of uint32.
    gap_start
        int64 ``[B + 1]``: where each cell's gaps begin.
    indptr
        int64 ``[B + 1]``: where each cell's counts begin.
    n_genes
        G.
    keys, cells, step, first_slot, obs
        As in :class:`~bgen.data.batch.CellBatch`.
    pool
        Where this batch has its memory from, and where unpacked ones take theirs; None: ordinary memory.
    """

    gaps: Tensor
    counts: Tensor
    overflow: Tensor
    gap_start: Tensor
    indptr: Tensor
    n_genes: int
    keys: Tensor
    cells: Tensor
    step: int = 0
    first_slot: int = 0
    obs: dict[str, Tensor] = field(default_factory=dict)
    pool: Pool | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def to(self, device: torch.device | str) -> PackedBatch:
        """Copy to a device (no copy where it is there already)."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        obs = {name: column.to(device, non_blocking=True) for name, column in self.obs.items()}
        if self.pool is not None and self.pool.pinned and moved["gaps"].is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(moved["gaps"].device))
            self.pool.hold(self, event)  # the copies are under way
        return PackedBatch(
            **moved, n_genes=self.n_genes, step=self.step, first_slot=self.first_slot, obs=obs, pool=self.pool
        )

    def to_csr(self) -> CellBatch:
        """Unpack into CSR, on the device where the batch is."""
        if self.gaps.device.type == "cpu":
            indices, counts = self._take((len(self.counts),), torch.int32), self._take((len(self.counts),))
            unpack_rows(*self._streams(), indices.numpy(), counts.numpy())
        else:
            indices, counts = unpack(self)
        return CellBatch(
            indptr=self.indptr,
            indices=indices,
            counts=counts,
            n_genes=self.n_genes,
            keys=self.keys,
            cells=self.cells,
            step=self.step,
            first_slot=self.first_slot,
            obs=self.obs,
        )

    def densify(self, out: Tensor | None = None) -> Tensor:
        """Unpack into a dense matrix, on the device where the batch is.

        Parameters
        ----------
        out
            float32 ``[>= B, G]``, contiguous; its first B rows are written. Giving the same matrix again and again
            saves the request for fresh memory, which takes most of the time.

        Returns
        -------
        Tensor
            float32 ``[B, G]``: the rows of ``out``, or of a matrix from the pool.
        """
        shape = (len(self), self.n_genes)
        if self.gaps.device.type == "cpu":
            dense = self._take(shape) if out is None else out[: len(self)]
            unpack_dense(*self._streams(), self.indptr.numpy(), dense.numpy())
            return dense
        return unpack_into(self, torch.empty(shape, device=self.gaps.device) if out is None else out[: len(self)])

    def _streams(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int32], NDArray[np.int64]]:
        return self.gaps.numpy(), self.counts.numpy(), self.overflow.numpy(), self.gap_start.numpy()

    def _take(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        if self.pool is None:
            return torch.empty(shape, dtype=dtype)
        return torch.from_numpy(self.pool.take(shape, "f4" if dtype == torch.float32 else "i4"))


def unpack(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Unpack in plain torch, without waiting for the device: all sizes follow from those of the batch.

    Returns
    -------
    tuple
        int32 ``[NNZ]`` gene numbers and float32 ``[NNZ]`` counts.
    """
    n, device = len(batch.counts), batch.gaps.device
    # genes: a running sum of gap + 1 within each cell, read where the byte is not an escape
    is_entry = batch.gaps != ESCAPE
    line = torch.cumsum(batch.gaps.int() + is_entry, 0, dtype=torch.int32)
    entries = torch.nonzero_static(is_entry, size=n)[:, 0] if n else torch.empty(0, dtype=torch.int64, device=device)
    before = torch.cat([line.new_zeros(1), line])[batch.gap_start[:-1]]  # the running sum before each cell
    indices = line[entries] - 1 - torch.repeat_interleave(before, batch.indptr.diff(), output_size=n)
    # counts: the k-th 255 takes the k-th entry of the overflow
    counts = batch.counts.float()
    if len(batch.overflow):
        large = torch.nonzero_static(batch.counts == ESCAPE, size=len(batch.overflow))[:, 0]
        counts[large] = (batch.overflow.long() & 0xFFFFFFFF).float()
    return indices, counts


def unpack_into(batch: PackedBatch, dense: Tensor) -> Tensor:
    """Unpack in plain torch into ``dense``, float32 ``[B, G]`` with any contents, and return it."""
    indices, counts = unpack(batch)
    rows = torch.repeat_interleave(
        torch.arange(len(batch), device=indices.device), batch.indptr.diff(), output_size=len(indices)
    )
    dense.zero_().view(-1).scatter_(0, rows * batch.n_genes + indices, counts)
    return dense
