"""After training along perturbations: average effects over the training cells of a store, shared among the ranks."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch

from bgen.arrays import F64, I64
from bgen.data.loader import CountReader
from bgen.distributed.world import World, all_sum
from bgen.effects.moments import Accumulator, GroupMoments

MOST_CELLS = 4_000_000
"""Training cells that averages are taken over, at most."""

MOST_SUMS = 250_000_000
"""Groups times genes, at most: 4 GB of sums."""

TOGETHER = 4096


def moments_of_store(reader: CountReader, cells: I64, context: I64, label: I64, world: World) -> GroupMoments | None:
    """Return the moments of groups of cells of a store; None if there are too many groups to hold.

    Parameters
    ----------
    cells
        Their numbers, ascending.
    context, label
        Of each; see :class:`bgen.effects.moments.GroupMoments`.
    """
    groups = [(int(a), int(b)) for a, b in np.unique(np.stack([context, label], 1), axis=0)]
    genes = reader.store.manifest.n_genes
    if len(groups) * genes > MOST_SUMS:
        return None
    sums = Accumulator(genes, groups)
    for part in np.array_split(np.arange(len(cells)), -(-len(cells) // TOGETHER))[world.rank :: world.size]:
        batch = reader.read_cells(cells[part])
        arrays = batch.counts.numpy(), batch.indices.numpy(), batch.indptr.numpy()
        sums.add(sp.csr_matrix(arrays, (len(part), genes)), context[part], label[part])
    for array in sums.sums:
        array[...] = all_sum(torch.from_numpy(array)).numpy()
    return sums.finish()


def number_sets(codes: I64, amounts: F64, is_control: np.ndarray, own: I64) -> tuple[I64, list[tuple[int, float]]]:
    """Return the number of what was done to each cell ``[n]`` (-1: nothing), and the label code and amount of each.

    ``codes [n]`` are labels, ``is_control`` says which of them are controls, and labels of the same members ``own`` are
    one.
    """
    same = {tuple(sorted(row[row >= 0].tolist())): code for code, row in reversed(list(enumerate(own)))}
    first = np.array([same[tuple(sorted(row[row >= 0].tolist()))] for row in own], np.int64)
    perturbed = ~is_control[codes]
    keys = np.stack([first[codes].astype(np.float64), np.nan_to_num(amounts, nan=-1.0)], 1)[perturbed]
    found, place = np.unique(keys, axis=0, return_inverse=True)
    numbers = np.full(len(codes), -1, np.int64)
    numbers[perturbed] = place.ravel()
    return numbers, [(int(code), np.nan if amount < 0 else float(amount)) for code, amount in found]
