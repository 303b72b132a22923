"""A batch of cells as the models take it: sparse counts, columns of obs, and one random key per cell.

Axes: B cells of the batch, G genes of the store, NNZ stored counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor


@dataclass
class CellBatch:
    """Counts of B cells in CSR form.

    Attributes
    ----------
    indptr
        int64 ``[B + 1]``: cell ``i`` owns entries ``indptr[i]:indptr[i + 1]``.
    indices
        int32 ``[NNZ]``: gene numbers in the store's order, ascending within a cell.
    counts
        float32 ``[NNZ]``: raw counts, all positive integers.
    n_genes
        G.
    obs
        Column name to ``[B]``: int64 codes of categories (-1 = unknown) or float32 numbers.
    keys
        int64 ``[B]``: a random key per cell, a pure function of (seed, step, slot in the global batch). Everything
        random that a model draws for a cell is derived from it (:mod:`bgen.nn.random`), so that the draw does not
        depend on the number of ranks.
    cells
        int64 ``[B]``: numbers of the cells in the store.
    step
        Optimiser step that the batch belongs to (0-based); in evaluation the number of steps done.
    first_slot
        Place of the first cell in the global batch of the step, of which this is a contiguous slice.
    """

    indptr: Tensor
    indices: Tensor
    counts: Tensor
    n_genes: int
    keys: Tensor
    cells: Tensor
    step: int = 0
    first_slot: int = 0
    obs: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def library(self) -> Tensor:
        """float32 ``[B]``: total counts of each cell."""
        return torch.segment_reduce(self.counts, "sum", offsets=self.indptr, initial=0.0)

    @property
    def slots(self) -> Tensor:
        """int64 ``[B]``: places of the cells in the global batch."""
        return torch.arange(self.first_slot, self.first_slot + len(self), device=self.indptr.device)

    @cached_property
    def rows(self) -> Tensor:
        """int64 ``[NNZ]``: the cell that each entry belongs to."""
        number = torch.arange(len(self), device=self.indptr.device)
        return torch.repeat_interleave(number, self.indptr.diff(), output_size=len(self.indices))

    @classmethod
    def join(cls, parts: Sequence[CellBatch]) -> CellBatch:
        """Return batches of one step as one, their cells one after the other."""
        sizes = torch.cat([part.indptr.diff() for part in parts])
        obs = {name: torch.cat([part.obs[name] for part in parts]) for name in parts[0].obs}
        return replace(
            parts[0],
            indptr=torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]),
            indices=torch.cat([part.indices for part in parts]),
            counts=torch.cat([part.counts for part in parts]),
            keys=torch.cat([part.keys for part in parts]),
            cells=torch.cat([part.cells for part in parts]),
            obs=obs,
        )

    def take(self, place: Tensor) -> CellBatch:
        """Return the cells at places int64 ``[B]`` of the batch; a place may come more than once."""
        size = self.indptr.diff()[place]
        indptr = torch.cat([size.new_zeros(1), size.cumsum(0)])
        shift = torch.repeat_interleave(self.indptr[place] - indptr[:-1], size)
        entry = torch.arange(int(indptr[-1])) + shift
        obs = {name: column[place] for name, column in self.obs.items()}
        return replace(
            self,
            indptr=indptr,
            indices=self.indices[entry],
            counts=self.counts[entry],
            keys=self.keys[place],
            cells=self.cells[place],
            obs=obs,
        )

    def to(self, device: torch.device | str) -> Self:
        """Copy to a device (no copy where it is there already)."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        obs = {name: column.to(device, non_blocking=True) for name, column in self.obs.items()}
        return replace(self, **moved, obs=obs)
