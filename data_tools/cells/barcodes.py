"""The names that the cells of a store have: barcodes, with the name of the file behind where several have one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.order.groups import parts
from data_tools.cells.texts import Texts


@dataclass(frozen=True, eq=False)
class Barcodes:
    """Names of cells.

    Attributes
    ----------
    texts
        Barcodes of the rows of all files.
    kept
        int64 ``[n_cells]``: the row of each cell; None: all rows are cells.
    source
        ``[n_cells]``: a place in ``endings``.
    endings
        What comes behind the barcodes of each file; None: nothing.
    """

    texts: Texts
    kept: I64 | None = None
    source: NDArray[np.int32] | None = None
    endings: Texts | None = None

    def __len__(self) -> int:
        return len(self.texts) if self.kept is None else len(self.kept)

    def width(self) -> int:
        """Return the bytes of the longest name, 1 at least."""
        longest = 1
        for part in parts(len(self)):
            longest = max(longest, int(self._sizes(np.arange(part.start, part.stop))[1].max()))
        return longest

    def read(self, cells: I64, width: int) -> NDArray[np.uint8]:
        """Return the names of some cells as UTF-8, uint8 ``[n, width]``, with zeros behind."""
        found = np.zeros((len(cells), width), np.uint8)
        middle, _ = self._sizes(cells)
        self.texts.write(self._rows(cells), found, np.zeros(len(cells), np.int64))
        if self.source is not None and self.endings is not None:
            self.endings.write(self.source[cells].astype(np.int64), found, middle)
        return found

    def _sizes(self, cells: I64) -> tuple[I64, I64]:
        """Return the bytes of barcodes, and of whole names."""
        sizes = self.texts.sizes(self._rows(cells))
        if self.source is None or self.endings is None:
            return sizes, sizes
        return sizes, sizes + self.endings.sizes(self.source[cells].astype(np.int64))

    def _rows(self, cells: I64) -> I64:
        return cells if self.kept is None else self.kept[cells]


def barcodes_of(index: pd.Index) -> Barcodes:
    """Return the names of an index."""
    texts = Texts()
    for part in parts(len(index)):
        texts.append(index[part].astype(str).to_numpy(object))
    return Barcodes(texts)


def texts_of(texts: Sequence[str]) -> Texts:
    """Return a few texts."""
    found = Texts()
    line = np.empty(len(texts), object)
    line[:] = texts
    found.append(line)
    return found
