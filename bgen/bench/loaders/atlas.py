"""A synthetic atlas of any size for measuring loaders: the counts of a cell are a pure function of (seed, cell).

Counts are negative binomial, ``x ~ NB(mean = l_n m_kg, dispersion r = 0.7)``, with a log-normal library factor ``l_n``
of cell ``n`` in 16 levels; ``log m_kg`` is normal over genes ``g`` (standard deviation 2.5) plus normal over cell types
``k`` (0.5). At the default size a cell has about 1,636 non-zeros of 20,000 genes, of which 57 % are 1, 96 % at most 15
and 0.1 % above 255. Cells stand batch after batch, as in a real atlas, and each batch has its own mix of types.

Axes: N cells, G genes, K types, L levels of the library factor.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numba
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.order.keys import hash_keys
from bgen.progress import Count
from bgen.store.format.manifest import Source
from data_tools.building.write import Contents

DISPERSION = 0.7
GENE_SPREAD = 2.5
TYPE_SPREAD = 0.5
LIBRARY_SPREAD = 0.3
LEVELS = 16
EXPRESSED = 0.0818
"""Share of the genes that a cell expresses, on average."""

CELLS_AT_ONCE = 8192

"""Called with the cells done and the cells in all."""


@dataclass(frozen=True)
class Atlas:
    """The atlas: give it rows, as in ``atlas[cells]``, and it draws their counts.

    Attributes
    ----------
    cells, genes
        N, G.
    batches, types
        Batches that the cells stand in one after the other, and K.
    seed
        Seed of everything.
    """

    cells: int = 400_000
    genes: int = 20_000
    batches: int = 24
    types: int = 48
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(N, G)."""
        return self.cells, self.genes

    @functools.cached_property
    def batch(self) -> NDArray[np.int32]:
        """int32 ``[N]``: batch of each cell, ascending."""
        sizes = np.random.default_rng([self.seed, 1]).gamma(4.0, size=self.batches)
        edges = np.round(np.cumsum(sizes / sizes.sum()) * self.cells)
        return np.searchsorted(edges, np.arange(self.cells), side="right").clip(max=self.batches - 1).astype(np.int32)

    @functools.cached_property
    def cell_type(self) -> NDArray[np.int32]:
        """int32 ``[N]``: type of each cell, drawn from its batch's mix."""
        rng = np.random.default_rng([self.seed, 2])
        usual = np.exp(rng.normal(0.0, 1.3, self.types))
        mix = usual * rng.gamma(0.3, size=(self.batches, self.types))
        edges = np.cumsum(mix, axis=1) / mix.sum(1, keepdims=True)
        draw = np.random.default_rng([self.seed, 3]).random(self.cells)
        chosen = np.empty(self.cells, np.int32)
        for batch in range(self.batches):
            members = self.batch == batch
            chosen[members] = np.searchsorted(edges[batch], draw[members], side="right").clip(max=self.types - 1)
        return chosen

    @functools.cached_property
    def means(self) -> NDArray[np.float64]:
        """float64 ``[K, G]``: ``m_kg``, scaled so that a cell expresses the wanted share of the genes."""
        rng = np.random.default_rng([self.seed, 4])
        log_means = rng.normal(0.0, GENE_SPREAD, self.genes) + rng.normal(0.0, TYPE_SPREAD, (self.types, self.genes))
        weights = np.bincount(self.cell_type, minlength=self.types) / self.cells
        points, shares = _on_grid(log_means, weights / self.genes)
        factors = _factors(6)
        low, high = -30.0, 30.0
        for _ in range(30):
            middle = (low + high) / 2
            expressed = np.mean([shares @ (1 - _zero(np.exp(points + middle) * factor)) for factor in factors])
            if abs(expressed - EXPRESSED) < 3e-7:  # too near for the grid
                expressed = np.mean(
                    [weights @ (1 - _zero(np.exp(log_means + middle) * factor)).mean(1) for factor in factors]
                )
            low, high = (low, middle) if expressed > EXPRESSED else (middle, high)
        return np.exp(log_means + low)

    @functools.cached_property
    def _library(self) -> NDArray[np.float64]:
        """float64 ``[L]``: levels of the library factor, equally likely."""
        return _factors(LEVELS)

    @functools.cached_property
    def _nonzero(self) -> NDArray[np.uint32]:
        """uint32 ``[K, L, G]``: probability of a non-zero count, in units of 2^-32."""
        table = np.empty((self.types, LEVELS, self.genes), np.uint32)
        for level, factor in enumerate(self._library):
            table[:, level] = (1 - _zero(self.means * factor)) * 2.0**32
        return table

    def __getitem__(self, cells: I64) -> sp.csr_matrix:
        """Draw the counts of cells: CSR uint32 with ascending int32 indices."""
        keys = hash_keys(self.seed, 5, cells)
        types = self.cell_type[cells]
        levels = (keys % np.uint64(LEVELS)).astype(np.int64)
        indptr = np.zeros(len(cells) + 1, np.int64)
        np.cumsum(_count(keys, types, levels, self._nonzero), out=indptr[1:])
        indices, counts = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.uint32)
        _draw(keys, types, levels, self._nonzero, self.means, self._library, indptr, indices, counts)
        return sp.csr_matrix((counts, indices, indptr), shape=(len(cells), self.genes))

    @property
    def obs(self) -> pd.DataFrame:
        """Columns batch and cell_type of every cell."""
        return pd.DataFrame(
            {
                "batch": pd.Categorical([f"batch{i:02d}" for i in self.batch]),
                "cell_type": pd.Categorical([f"type{i:02d}" for i in self.cell_type]),
            },
            index=[f"cell{i:08d}" for i in range(self.cells)],
        )

    @property
    def gene_ids(self) -> list[str]:
        """Made-up ids of the genes."""
        return [f"GENE{i:05d}" for i in range(self.genes)]

    def contents(self) -> Contents:
        """Return what a store of the atlas holds; all cells are for training."""
        return Contents(
            counts=self,
            genes=pd.DataFrame({"id": self.gene_ids, "symbol": self.gene_ids}),
            obs=self.obs,
            split=np.zeros(self.cells, np.uint8),
            splits=["train"],
            source=np.zeros(self.cells, np.int32),
            row=np.arange(self.cells),
            sources=[Source(name="synthetic atlas", bytes=0, cells=self.cells, kept=self.cells, matrix="X")],
            organism="synthetic",
            roles={"batch": "batch", "cell_type": "cell_type"},
        )

    def write_h5ad(self, path: Path, progress: Count | None = None) -> None:
        """Write an uncompressed h5ad of CSR float32, block by block; it appears under its name when it is complete."""
        partial = path.with_name(f".{path.name}.partial")
        bare = anndata.AnnData(shape=self.shape, obs=self.obs, var=pd.DataFrame(index=self.gene_ids))
        bare.write_h5ad(partial)
        blocks = [np.arange(i, min(i + CELLS_AT_ONCE, self.cells)) for i in range(0, self.cells, CELLS_AT_ONCE)]
        with h5py.File(partial, "a") as file:
            if "X" in file:
                del file["X"]
            group = file.create_group("X")
            group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": self.shape})
            arrays = {
                name: group.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(1 << 20,))
                for name, dtype in (("data", np.float32), ("indices", np.int32))
            }
            indptr = np.zeros(self.cells + 1, np.int64)
            for cells in blocks:
                rows = self[cells]
                start = indptr[cells[0]]
                indptr[cells[0] + 1 : cells[-1] + 2] = start + rows.indptr[1:]
                for name, array in arrays.items():
                    array.resize((int(indptr[cells[-1] + 1]),))
                    array[start:] = getattr(rows, name)
                if progress:
                    progress(int(cells[-1]) + 1, self.cells)
            group.create_dataset("indptr", data=indptr)
        partial.rename(path)


def _factors(levels: int) -> NDArray[np.float64]:
    """Return equally likely levels of the log-normal library factor."""
    draws = np.random.default_rng(0).normal(0.0, LIBRARY_SPREAD, 100_000)
    return np.exp(np.quantile(draws, (np.arange(levels) + 0.5) / levels))


def _on_grid(
    values: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return points .001 apart and the weights that stand for values ``[K, G]`` with weights ``[K]``.

    Every value is shared between its two neighbours, so that the mean of a smooth function is off by some 1e-8.
    """
    step = 1e-3
    first = np.floor(values.min() / step)
    place = values / step - first
    below = place.astype(np.int64)
    above, weight = place - below, np.broadcast_to(weights[:, None], values.shape)
    size = int(below.max()) + 2
    shares: NDArray[np.float64] = np.zeros(size)
    for neighbour, part in ((below, 1 - above), (below + 1, above)):
        shares += np.bincount(neighbour.ravel(), (weight * part).ravel(), size)
    points: NDArray[np.float64] = (np.arange(size) + first) * step
    return points, shares


def _zero(mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return P(x = 0) of the negative binomial."""
    return np.asarray((DISPERSION / (DISPERSION + mean)) ** DISPERSION)


@numba.njit(inline="always")
def _mix(x: np.uint64) -> np.uint64:
    """The finaliser of SplitMix64, as in :mod:`bgen.order.keys`."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _count(
    keys: NDArray[np.uint64], types: NDArray[np.int32], levels: I64, nonzero: NDArray[np.uint32]
) -> NDArray[np.int64]:
    """Return int64 ``[N]``: how many genes each cell expresses."""
    found = np.zeros(len(keys), np.int64)
    for n in range(len(keys)):
        thresholds = nonzero[types[n], levels[n]]
        total = 0
        for g in range(len(thresholds)):
            total += (_mix(keys[n] + np.uint64(g)) >> np.uint64(32)) < thresholds[g]
        found[n] = total
    return found


@numba.njit(cache=True, nogil=True)
def _draw(
    keys: NDArray[np.uint64],
    types: NDArray[np.int32],
    levels: I64,
    nonzero: NDArray[np.uint32],
    means: NDArray[np.float64],
    library: NDArray[np.float64],
    indptr: I64,
    indices: NDArray[np.int32],
    counts: NDArray[np.uint32],
) -> None:
    """Fill ``indices`` and ``counts``: a positive count by inversion of the zero-truncated negative binomial."""
    for n in range(len(keys)):
        thresholds = nonzero[types[n], levels[n]]
        k = indptr[n]
        for g in range(len(thresholds)):
            bits = _mix(keys[n] + np.uint64(g))
            if (bits >> np.uint64(32)) >= thresholds[g]:
                continue
            mean = means[types[n], g] * library[levels[n]]
            ratio = mean / (mean + DISPERSION)
            zero = math.pow(1.0 - ratio, DISPERSION)
            left = (np.float64(bits & np.uint64(0xFFFFFFFF)) + 0.5) * 2.0**-32 * (1.0 - zero)
            probability = zero * DISPERSION * ratio
            count = 1
            while left > probability and count < 1_000_000:
                left -= probability
                probability *= (count + DISPERSION) / (count + 1) * ratio
                count += 1
            indices[k] = g
            counts[k] = count
            k += 1
