"""From a store and its order to batches: read windows ahead, decode rows, hand over :class:`CellBatch`.

A thread runs ahead of the training loop; decoding releases the interpreter lock. Each lane keeps the bytes of one
window and has the next one on its way.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bgen.data.batch import CellBatch
from bgen.data.codec import decode_rows
from bgen.data.keys import hash_keys
from bgen.data.order import Order
from bgen.data.store import I64, Rows, Store

Key = tuple[int, int, int]

_TRAIN, _VALID = 1, 2  # what a cell's random key is for


@dataclass(frozen=True, eq=False)
class Bytes:
    """The bytes of some chunks and where the cells lie in them."""

    gaps: NDArray[np.uint8]
    counts: NDArray[np.uint8]
    rows: Rows
    cells: I64  # numbers of the cells in the order in which they are taken
    pick: I64  # their places in the rows


class CountReader:
    """Reads cells of a store as :class:`CellBatch`.

    Parameters
    ----------
    store
        The store.
    columns
        Columns of obs (or roles) that batches carry, under their column names.
    """

    def __init__(self, store: Store, columns: Sequence[str] = ()) -> None:
        self.store = store
        self._columns: dict[str, NDArray[Any]] = {}
        for name in columns:
            self._columns[store.column_name(name)] = store.column(name)[1]

    def read_cells(self, cells: I64, keys: NDArray[np.integer[Any]] | None = None, step: int = 0) -> CellBatch:
        """Read any cells, in the order given (ascending ones touch each chunk once)."""
        at = np.searchsorted(self.store.first_cell, cells, side="right") - 1
        chunks = np.unique(at)
        loaded = self.finish(self.store.read_chunks(chunks), chunks, cells)
        return self.assemble([(loaded, 0, len(cells))], hash_keys(0, cells) if keys is None else keys, step)

    def finish(self, futures: tuple[Any, Any], chunks: I64, cells: I64) -> Bytes:
        """Wait for the bytes of ``chunks`` and find ``cells`` in them."""
        rows = self.store.rows_of(chunks)
        at = np.searchsorted(self.store.first_cell, cells, side="right") - 1
        place = np.argsort(chunks, kind="stable")
        slot = place[np.searchsorted(chunks[place], at)]
        pick = rows.begins[slot] + cells - self.store.first_cell[at]
        try:
            gaps, counts = (future.result() for future in futures)
        except ValueError as error:
            raise self.store.damaged(error) from None
        return Bytes(gaps.reshape(-1), counts.reshape(-1), rows, cells, pick)

    def assemble(
        self, pieces: Sequence[tuple[Bytes, int, int]], keys: NDArray[np.integer[Any]], step: int, first_slot: int = 0
    ) -> CellBatch:
        """Decode pieces ``(bytes, start, stop)``, each cells ``start:stop`` in its order, into one batch."""
        cells = np.concatenate([piece.cells[start:stop] for piece, start, stop in pieces])
        sizes = [piece.rows.nonzeros[piece.pick[start:stop]] for piece, start, stop in pieces]
        indptr = np.concatenate([[0], *sizes]).cumsum()
        indices = np.empty(indptr[-1], np.int32)
        counts = np.empty(indptr[-1], np.float32)
        at = 0
        for piece, start, stop in pieces:
            pick = piece.pick[start:stop]
            rows = piece.rows
            decode_rows(
                piece.gaps,
                piece.counts,
                rows.gap_start[pick],
                rows.count_start[pick],
                rows.overflow_start[pick],
                np.arange(at, at + len(pick)),
                indptr,
                indices,
                counts,
            )
            at += len(pick)
        return CellBatch(
            indptr=torch.from_numpy(indptr),
            indices=torch.from_numpy(indices),
            counts=torch.from_numpy(counts),
            n_genes=self.store.manifest.n_genes,
            keys=torch.from_numpy(np.asarray(keys).astype(np.uint64).view(np.int64)),
            cells=torch.from_numpy(cells),
            step=step,
            first_slot=first_slot,
            obs={name: self._pick_obs(values, cells) for name, values in self._columns.items()},
        )

    @staticmethod
    def _pick_obs(values: NDArray[Any], cells: I64) -> Tensor:
        picked = values[cells]
        return torch.from_numpy(picked.astype(np.float32 if picked.dtype.kind == "f" else np.int64))


class TrainLoader:
    """The batches of one rank, step by step, for ever; resumed by the number of the step.

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
        self._windows: dict[Key, Bytes] = {}
        self._coming: dict[Key, tuple[tuple[Any, Any], I64, I64]] = {}

    def steps(self, start: int = 0) -> Iterator[list[CellBatch]]:
        """Yield the micro batches of each step from ``start`` on, read ahead by a thread."""
        ready: queue.Queue[list[CellBatch] | BaseException] = queue.Queue(self.prefetch)
        stop = threading.Event()

        def work() -> None:
            step = start
            item: list[CellBatch] | BaseException
            while not stop.is_set():
                try:
                    item = self.read(step)
                except BaseException as error:  # handed to the training loop, which raises it
                    item = error
                while not stop.is_set():
                    try:
                        ready.put(item, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if isinstance(item, BaseException):
                    return
                step += 1

        thread = threading.Thread(target=work, name="bgen-loader", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def read(self, step: int) -> list[CellBatch]:
        """Read the micro batches of one step."""
        used: dict[int, Key] = {}
        batches = []
        for low, high in self._slices:
            pieces = []
            for run in self.order.runs(step, low, high):
                pieces.append((self._window(run.window), run.start, run.stop))
                lane = run.window[1]
                used[lane] = max(used.get(lane, run.window), run.window)
            keys = hash_keys(self.seed, _TRAIN, step, np.arange(low, high))
            batches.append(self.reader.assemble(pieces, keys, step, low))
        for key in [key for key in self._windows if key[1] not in used or key < used[key[1]]]:
            del self._windows[key]
        return batches

    def _window(self, key: Key) -> Bytes:
        if key not in self._windows:
            self._windows[key] = self.reader.finish(*(self._coming.pop(key, None) or self._ask(key)))
            following = self.order.next_window(key)
            self._coming = {k: v for k, v in self._coming.items() if k[1] != key[1]}
            self._coming[following] = self._ask(following)
        return self._windows[key]

    def _ask(self, key: Key) -> tuple[tuple[Any, Any], I64, I64]:
        window = self.order.read_window(key)
        return self.reader.store.read_chunks(window.chunks), window.chunks, window.cells


def valid_batches(
    reader: CountReader, split: str, *, seed: int, cells: int, micro_batch: int, rank: int = 0, world: int = 1
) -> list[tuple[CellBatch, Tensor]]:
    """Read this rank's share of the held-out cells.

    Returns
    -------
    list
        As many (batch, weight ``[B]``) on each rank, each of the same size; the weight of padding is 0.
    """
    members = reader.store.cells_of_split(split)
    if len(members) > cells:
        members = np.sort(members[np.argsort(hash_keys(seed, _VALID, members))[:cells]])
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
