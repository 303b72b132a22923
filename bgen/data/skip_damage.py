"""Training on without the chunks that are damaged.

By default a damaged chunk ends the run, with an error that names its file. A run that must not end can read with a
:class:`SkippingReader`. It puts the next readable cell of the same window in place of a cell that cannot be read (or,
if the window has none, a cell of the same split), and counts both chunks and cells. Batches keep their size and their
keys, and the order of all other cells is the same. A store that cannot be reached is never skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.data.loader import Chunks, CountReader
from bgen.data.packed import PackedBatch
from bgen.store.arena import Arena
from bgen.store.store import Store


class SkippingReader(CountReader):
    """A reader that skips damaged chunks; its parameters are those of :class:`bgen.data.loader.CountReader`.

    Attributes
    ----------
    skipped
        Numbers of the chunks that are damaged, and what is wrong with each.
    skipped_cells
        Cells of batches that were replaced so far.
    """

    def __init__(self, store: Store, columns: Sequence[str] = (), *, pinned: bool = False) -> None:
        super().__init__(store, columns, pinned=pinned)
        self.skipped: dict[int, str] = {}
        self.skipped_cells = 0
        self._chunks: WeakKeyDictionary[Chunks, I64] = WeakKeyDictionary()
        self._mended: WeakKeyDictionary[Chunks, tuple[Chunks, NDArray[np.bool_]]] = WeakKeyDictionary()

    def start(self, chunks: I64, cells: I64, arena: Arena | None = None) -> Chunks:
        """See :class:`bgen.data.loader.CountReader`."""
        loaded = super().start(chunks, cells, arena)
        self._chunks[loaded] = chunks
        return loaded

    def pack(
        self, pieces: Sequence[tuple[Chunks, int, int]], keys: NDArray[np.integer[Any]], step: int, first_slot: int = 0
    ) -> PackedBatch:
        """See :class:`bgen.data.loader.CountReader`.

        Raises
        ------
        UserError
            If no cell of a window can be read, or the store cannot be reached.
        """
        whole = []
        for piece, start, stop in pieces:
            mended, lost = self._mend(piece)
            if lost.any():  # or another thread's sum could be lost
                self.skipped_cells += int(lost[start:stop].sum())
            whole.append((mended, start, stop))
        return super().pack(whole, keys, step, first_slot)

    def _mend(self, piece: Chunks) -> tuple[Chunks, NDArray[np.bool_]]:
        """Return a window with readable cells in place of unreadable ones, and which cells were unreadable."""
        if piece in self._mended:
            return self._mended[piece]
        nothing = np.zeros(len(piece.cells), bool)
        errors = [error for future in piece.futures if (error := future.exception()) is not None]
        if not errors:
            return piece, nothing
        if any(not isinstance(error, ValueError) for error in errors):
            return piece, nothing  # it cannot be reached: packing says so
        chunk_of = np.searchsorted(self.store.first_cell, piece.cells, side="right") - 1
        for chunk, slot in zip(self._chunks[piece].tolist(), piece.slots.tolist(), strict=True):
            (future,) = self.store.read_chunks(np.array([chunk]), piece.arena, np.array([slot]))
            if isinstance(error := future.exception(), ValueError):
                self.skipped[chunk] = str(error)
        lost = np.isin(chunk_of, list(self.skipped))
        if lost.all():
            return self._read_another(piece, int(chunk_of[0])), lost
        good = np.flatnonzero(~lost)
        # for each cell the next readable one in the window's order; after the last comes the first
        stand_in = good[np.searchsorted(good, np.arange(len(lost))) % len(good)]
        mended = replace(piece, rows=piece.rows[stand_in], cells=piece.cells[stand_in], futures=[])
        self._mended[piece] = mended, lost
        return mended, lost

    def _read_another(self, piece: Chunks, chunk: int) -> Chunks:
        """Return cells of the same split from the next readable chunk, for a window without a readable cell."""
        splits, first_cell = self.store.rows("split"), self.store.first_cell
        n_chunks = len(first_cell) - 1
        for number in (np.arange(chunk + 1, chunk + n_chunks) % n_chunks).tolist():
            cells = np.arange(first_cell[number], first_cell[number + 1])
            cells = cells[splits[cells] == splits[piece.cells[0]]]
            if number in self.skipped or len(cells) == 0:
                continue
            other = super().start(np.array([number]), np.resize(cells, len(piece.cells)))
            if isinstance(error := other.futures[0].exception(), ValueError):
                self.skipped[number] = str(error)
                continue
            self._mended[piece] = other, np.ones(len(piece.cells), bool)
            return other
        return piece
