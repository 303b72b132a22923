"""Reference cells for annotation, drawn from any number of labelled cells, of which memory holds a few at a time.

Cells are drawn by a keyed hash of their number: all alike, so that frequent labels stay frequent, and a few of every
label, so that none is lost.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.order.keys import hash_keys
from bgen.tasks.blocks.cells import BlockCells

MOST_CELLS = 20_000
"""Reference cells that are drawn from all."""

OF_EACH = 20
"""Reference cells of every label at least, if it has as many."""

WINDOW = 65_536
"""Cells whose labels are read at once."""

REFERENCE = 11  # what the hash is for


def read_reference(cells: BlockCells, label: str) -> tuple[I64, NDArray[np.str_]]:
    """Return ascending numbers of reference cells, and their labels; none if no cell has a label."""
    kept = pd.DataFrame({"cell": np.zeros(0, np.int64), "key": np.zeros(0, np.uint64), "label": np.zeros(0, object)})
    if label in cells.columns:
        for start in range(0, len(cells), WINDOW):
            stop = min(start + WINDOW, len(cells))
            texts, numbers = cells.texts(label, start, stop), np.arange(start, stop)
            there = texts != ""
            found = {"cell": numbers, "key": hash_keys(REFERENCE, numbers), "label": texts.astype(object)}
            kept = _draw(pd.concat([kept, pd.DataFrame(found)[there]], ignore_index=True))
    kept = kept.sort_values("cell")
    return kept["cell"].to_numpy(np.int64), kept["label"].to_numpy(dtype=str)


def _draw(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the cells with the smallest keys, among all and of each label."""
    cells = cells.sort_values("key", ignore_index=True)
    place = cells.groupby("label").cumcount()
    return cells[(np.arange(len(cells)) < MOST_CELLS) | (place < OF_EACH)]
