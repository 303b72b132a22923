"""From a store and its order to batches: read windows ahead, pack rows, hand over packed or unpacked batches.

A thread runs ahead of the training loop; it and the threads that decode release the interpreter lock. The bytes of one
window of each lane are kept. The lanes reach the ends of their windows at different steps (:mod:`bgen.order.cells`), so
it is enough to read ahead the few windows that will be needed first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bgen.arrays import I64
from bgen.data.batch import CellBatch
from bgen.data.buffers import Pool
from bgen.data.packed import PackedBatch
from bgen.data.run_ahead import run_ahead
from bgen.errors import UserError
from bgen.order.cells import Order
from bgen.order.keys import hash_keys
from bgen.store.arena import Arena
from bgen.store.format.codec import copy_rows
from bgen.store.store import Store

Key = tuple[int, int, int]

TOGETHER = 64
"""Chunks that are in memory at once where scattered cells are read."""

_TRAIN, _VALID = 1, 2  # what a cell's random key is for


@dataclass(frozen=True, eq=False)
class Chunks:
    """Chunks in an arena, perhaps still on their way, and where the wanted cells lie in it."""

    arena: Arena
    slots: I64
    rows: I64  # [R, 6], see bgen.store.format.codec.locate_rows
    cells: I64  # [R] numbers of the cells in the order in which they are taken
    futures: list[Future[None]]

    def give_back(self) -> None:
        """Free the slots."""
        for future in self.futures:
            future.exception()  # until this is known they are written to
        self.arena.give(self.slots)


class CountReader:
    """Reads cells of a store as batches.

    Parameters
    ----------
    store
        The store.
    columns
        Columns of obs (or roles) that batches carry, under their column names.
    pinned
        Put packed batches into page-locked memory, from which copies to a GPU run beside the computation.
    """

    def __init__(self, store: Store, columns: Sequence[str] = (), *, pinned: bool = False) -> None:
        self.store = store
        self._pool = Pool(pinned=pinned, slack=0.125)
        self._columns: dict[str, NDArray[Any]] = {}
        for name in columns:
            self._columns[store.column_name(name)] = store.column(name)[1]

    def read_cells(self, cells: I64, keys: NDArray[np.integer[Any]] | None = None, step: int = 0) -> CellBatch:
        """Read any cells, in the order given (ascending ones touch each chunk once).

        Cells of many chunks are read a few chunks at a time, so that memory holds the cells and not their chunks.
        """
        keys = hash_keys(0, cells) if keys is None else keys
        at = np.searchsorted(self.store.first_cell, cells, side="right") - 1
        chunks = np.unique(at)
        if len(chunks) <= TOGETHER:
            return self.pack([(self.start(chunks, cells), 0, len(cells))], keys, step).to_csr()
        parts, order = [], []
        for first in range(0, len(chunks), TOGETHER):
            some = chunks[first : first + TOGETHER]
            places = np.flatnonzero((at >= some[0]) & (at <= some[-1]))
            parts.append(self.pack([(self.start(some, cells[places]), 0, len(places))], keys[places], step).to_csr())
            order.append(places)
        joined = CellBatch.join(parts)
        return joined.take(torch.from_numpy(np.argsort(np.concatenate(order))))

    def start(self, chunks: I64, cells: I64, arena: Arena | None = None) -> Chunks:
        """Start to read ``chunks`` for the sake of ``cells``: into the arena if it has room, else into a new one."""
        slots = None if arena is None else arena.take(len(chunks))
        if arena is None or slots is None:
            arena, slots = self.store.arena(len(chunks)), np.arange(len(chunks))
        futures = self.store.read_chunks(chunks, arena, slots)
        return Chunks(arena, slots, self.store.locate(cells, chunks, slots), cells, futures)

    def pack(
        self, pieces: Sequence[tuple[Chunks, int, int]], keys: NDArray[np.integer[Any]], step: int, first_slot: int = 0
    ) -> PackedBatch:
        """Pack pieces into one batch; a piece ``(chunks, start, stop)`` is the cells ``start:stop`` of some chunks.

        Raises
        ------
        UserError
            If bytes are not what was written, or no cells; :class:`bgen.errors.Unreachable` if they cannot be read now.
        """
        cells = np.concatenate([piece.cells[start:stop] for piece, start, stop in pieces])
        sizes = np.concatenate([piece.rows[start:stop, 1::2] for piece, start, stop in pieces])
        ends = np.zeros((3, len(cells) + 1), np.int64)
        np.cumsum(sizes.T, axis=1, out=ends[:, 1:])
        n_gaps, n_counts, n_overflow = ends[:, -1].tolist()
        gaps, counts = self._pool.take((n_gaps,), np.uint8), self._pool.take((n_counts,), np.uint8)
        overflow = np.empty(n_overflow, np.int32)
        filled = np.zeros(3, np.int64)
        for piece, start, stop in pieces:
            try:
                for future in piece.futures:
                    future.result()
            except (ValueError, OSError) as error:
                raise self.store.unread(error) from None
            flat = piece.arena.gaps.reshape(-1), piece.arena.counts.reshape(-1)
            n_genes = self.store.manifest.n_genes
            bad = copy_rows(*flat, piece.rows[start:stop], n_genes, gaps, counts, overflow, filled)
            if bad >= 0:
                raise self.store.damaged(ValueError(f"cell {piece.cells[start + bad]} does not decode into counts"))
        return PackedBatch(
            gaps=torch.from_numpy(gaps),
            counts=torch.from_numpy(counts),
            overflow=torch.from_numpy(overflow),
            gap_start=torch.from_numpy(ends[0]),
            indptr=torch.from_numpy(ends[1]),
            n_genes=self.store.manifest.n_genes,
            keys=torch.from_numpy(np.asarray(keys).astype(np.uint64).view(np.int64)),
            cells=torch.from_numpy(cells),
            step=step,
            first_slot=first_slot,
            obs={name: self._pick_obs(values, cells) for name, values in self._columns.items()},
            pool=self._pool,
        )

    @staticmethod
    def _pick_obs(values: NDArray[Any], cells: I64) -> Tensor:
        picked = values[cells]
        return torch.from_numpy(picked.astype(np.float32 if picked.dtype.kind == "f" else np.int64))


class TrainLoader:
    """The batches of one rank, step by step and without end; to resume, give the number of the step.

    Parameters
    ----------
    reader
        What reads the cells.
    order
        Which cells belong to which step.
    seed
        Seed of the cells' random keys.
    rank, world
        This rank and how many there are; their product with ``micro_batch`` divides the global batch.
    micro_batch
        Cells per forward pass; None: all of the rank's share.
    prefetch
        Steps that are read ahead.
    """

    def __init__(
        self,
        reader: CountReader,
        order: Order,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        micro_batch: int | None = None,
        prefetch: int = 4,
    ) -> None:
        share = order.batch // world
        self.reader, self.order, self.seed, self.prefetch = reader, order, seed, prefetch
        micro = share if micro_batch is None else micro_batch
        assert order.batch == share * world, "the trainer checks that the ranks divide the global batch"
        assert share % micro == 0, "the trainer checks that the micro batch divides a rank's share"
        self._slices = [(a, a + micro) for a in range(rank * share, (rank + 1) * share, micro)]
        self._windows: dict[Key, Chunks] = {}
        lanes = min(order.lanes, -(-order.lanes // world) + 1)
        self._ahead = reader.store.windows_ahead(order.window)
        self._arena = reader.store.arena((2 * lanes + self._ahead) * order.window)

    def steps(self, start: int = 0) -> Iterator[list[CellBatch]]:
        """Yield the micro batches of each step from ``start`` on, read ahead by a thread."""
        return run_ahead(self.read, start, self.prefetch)

    def packed_steps(self, start: int = 0) -> Iterator[list[PackedBatch]]:
        """Yield the same batches packed, to be unpacked where they are needed."""
        return run_ahead(self.read_packed, start, self.prefetch)

    def read(self, step: int) -> list[CellBatch]:
        """Read the micro batches of one step."""
        return [batch.to_csr() for batch in self.read_packed(step)]

    def read_packed(self, step: int) -> list[PackedBatch]:
        """Read the micro batches of one step, packed."""
        runs = [list(self.order.runs(step, low, high)) for low, high in self._slices]
        used: dict[int, tuple[Key, int]] = {}  # of each lane the last window and how far it was read
        for run in (run for slice_runs in runs for run in slice_runs):
            self._window(run.window)  # all are on their way before the first one is waited for
            lane = run.window[1]
            used[lane] = max(used.get(lane, (run.window, 0)), (run.window, run.stop))
        batches = [
            self.reader.pack(
                [(self._windows[run.window], run.start, run.stop) for run in slice_runs],
                hash_keys(self.seed, _TRAIN, step, np.arange(low, high)),
                step,
                low,
            )
            for (low, high), slice_runs in zip(self._slices, runs, strict=True)
        ]
        self._turn_pages(used)
        return batches

    def _turn_pages(self, used: dict[int, tuple[Key, int]]) -> None:
        """Forget what was read and start to read the windows that will be needed first."""
        left = {key: len(self._windows[key].cells) - stop for key, stop in used.values()}
        ending = sorted(left, key=lambda key: (left[key], key))[: self._ahead]
        soonest = [self.order.next_window(key) for key in ending]
        for key in [key for key in self._windows if key[1] not in used or key < used[key[1]][0]]:
            self._windows.pop(key).give_back()
        for key in soonest:
            self._window(key)

    def _window(self, key: Key) -> Chunks:
        if key not in self._windows:
            window = self.order.read_window(key)
            self._windows[key] = self.reader.start(window.chunks, window.cells, self._arena)
        return self._windows[key]


def valid_batches(
    reader: CountReader, split: str, *, seed: int, cells: int, micro_batch: int, rank: int = 0, world: int = 1
) -> list[tuple[CellBatch, Tensor]]:
    """Read this rank's share of the held-out cells.

    Returns
    -------
    list
        Pairs of a batch and a weight ``[B]``: as many on each rank, all of the same size. Padding has weight 0.

    Raises
    ------
    UserError
        If the split holds no cells.
    """
    every = reader.store.split(split)
    if len(every) == 0:
        raise UserError(f"The split '{split}' of {reader.store.folder} holds no cells. Choose another data.valid.")
    members = reader.store.sample(every, cells, seed, _VALID)
    per_step = min(micro_batch, -(-len(members) // world)) * world
    batches = []
    for start in range(0, len(members), per_step):
        at = start + np.arange(rank * per_step // world, (rank + 1) * per_step // world)
        weight = torch.from_numpy((at < len(members)).astype(np.float32))
        picked = members[np.minimum(at, len(members) - 1)]
        batch = reader.read_cells(picked, hash_keys(seed, _VALID, picked))
        batch.first_slot = int(at[0])
        batches.append((batch, weight))
    return batches
