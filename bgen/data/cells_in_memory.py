"""Batches of cells that lie in memory, such as those of a user's AnnData.

Axes: N cells in memory, B cells of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from bgen.data.batch import CellBatch
from bgen.order.keys import hash_keys


@dataclass(frozen=True)
class MemoryCells:
    """Counts ``[N, G]`` (CSR float32, sorted, without explicit zeros) and columns of obs ``[N]`` (codes or numbers)."""

    counts: sp.csr_matrix
    obs: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return int(self.counts.shape[0])

    def digest(self) -> str:
        """Return the SHA-256 of all counts and columns."""
        digest = hashlib.sha256(repr(self.counts.shape).encode())
        for array in (self.counts.indptr, self.counts.indices, self.counts.data):
            digest.update(array.tobytes())
        for name, column in sorted(self.obs.items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    def batch(self, rows: NDArray[np.int64], keys: NDArray[np.uint64], step: int = 0, first_slot: int = 0) -> CellBatch:
        """Return the cells ``rows [B]`` with their random keys ``[B]``."""
        some = self.counts[rows]
        return CellBatch(
            indptr=torch.from_numpy(some.indptr.astype(np.int64)),
            indices=torch.from_numpy(some.indices.astype(np.int32)),
            counts=torch.from_numpy(some.data.astype(np.float32)),
            n_genes=some.shape[1],
            keys=torch.from_numpy(keys.view(np.int64)),
            cells=torch.from_numpy(np.asarray(rows, np.int64)),
            step=step,
            first_slot=first_slot,
            obs={name: torch.from_numpy(column[rows]) for name, column in self.obs.items()},
        )


def rows_of_step(cells: NDArray[np.int64], batch: int, step: int, seed: int) -> NDArray[np.int64]:
    """Return the ``batch`` cells of a step. An epoch is a permutation of the cells; a batch may span two epochs."""
    places = np.arange(step * batch, (step + 1) * batch)
    epochs, within = places // len(cells), places % len(cells)
    rows = np.empty(batch, np.int64)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, int(epoch)]).permutation(len(cells))
        rows[epochs == epoch] = cells[order[within[epochs == epoch]]]
    return rows


def keys_of_step(seed: int, step: int, batch: int) -> NDArray[np.uint64]:
    """Return a random key ``[batch]`` per slot of a step."""
    return hash_keys(seed, np.arange(step * batch, (step + 1) * batch))
