"""From a store and the order of its trajectories to batches on the grid of trajectories, time points and cells."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bgen.config.data import TrajectoriesConfig
from bgen.data.batch import CellBatch
from bgen.data.loader import CountReader
from bgen.data.pools import Pool, read_pools
from bgen.data.run_ahead import run_ahead
from bgen.data.trajectory_batch import TrajectoryBatch
from bgen.errors import UserError
from bgen.order.cells import pick
from bgen.order.keys import hash_keys
from bgen.order.mixing import Mixing
from bgen.order.pools import Key, PooledTrajectories
from bgen.order.trajectories import GridOfCells, Trajectories, TrajectoryOrder
from bgen.store.store import Store

_TRAIN, _VALID = 3, 4  # what a cell's random key is for


def read_trajectories(store: Store, split: str, config: TrajectoriesConfig, amount: str | None = None) -> Trajectories:
    """Find the trajectories of a split; along a perturbation, those of each ``amount`` (obs column or role), if given.

    Raises
    ------
    UserError
        If the store lacks a column or role that trajectories need, or the split holds no trajectory.
    """
    cells = store.split(split)

    def column(name: str) -> NDArray[Any]:
        return pick(store.column(name)[1], cells)

    def share(n: int, kind: np.dtype[Any], fill: Callable[[NDArray[Any]], None]) -> NDArray[Any]:
        return store.share(f"trajectories 1/{split}/{config.along}/{config.system}/{over_time}/{amount}", n, kind, fill)

    system = [column(name) for name in config.system]
    labels, control, over_time = None, -1, False
    if config.along == "perturbation" or "perturbation" in store.manifest.roles:
        about, values = store.column("perturbation")
        labels = pick(values, cells)
        if store.manifest.control in about.categories:
            control = about.categories.index(str(store.manifest.control))
    if config.along == "perturbation":
        assert labels is not None
        if control < 0:
            raise UserError(
                f"data.trajectories.along=perturbation: the store {store.folder} does not say which value of its "
                "perturbation column is the control. Build it with that."
            )
        given = None if amount is None else column(amount)
        known = "time" in store.manifest.roles and store.manifest.columns[store.column_name("time")].kind == "number"
        over_time = config.times > 2 and known
        time = column("time") if over_time else None
        found = Trajectories.along_perturbation(cells, system, labels, control, given, time, share)
        lacks = "a system with both control and perturbed cells"
    else:
        if "time" not in store.manifest.roles:
            raise UserError(
                f"data.trajectories: the store {store.folder} does not know which column is the time of its cells, and "
                "in which unit, so a model of it could not be asked for times. Build the store with --time COLUMN "
                "--time-unit UNIT (AnnData in zarr: data.anndata.roles={time: COLUMN})."
            )
        if store.manifest.columns[store.column_name("time")].kind != "number":
            raise UserError(f"data.trajectories: time of the store {store.folder} is not a number.")
        is_control = np.zeros(len(cells), bool) if labels is None else labels == control
        found = Trajectories.over_time(cells, system, column("time"), is_control, share)
        lacks = "a cell with a time"
    if len(found) == 0:
        raise UserError(f"data.trajectories: the split '{split}' of {store.folder} has no trajectory: not {lacks}.")
    group = store.shuffled_within()
    return found if group is None else found.shuffled_within(group, by_cell=True)


def read_batch(
    reader: CountReader,
    grids: Sequence[GridOfCells],
    keys: np.ndarray,
    step: int,
    first_slot: int,
    mixing: Mixing | None = None,
) -> TrajectoryBatch:
    """Read the cells of trajectories; ``keys [B T N]`` are the cells' random keys."""
    numbers = np.stack([grid.cells for grid in grids]).reshape(-1)
    # Each cell is read once, in ascending order, which touches each chunk once.
    distinct, place = np.unique(numbers, return_inverse=True)
    cells = reader.read_cells(distinct).take(torch.from_numpy(place))
    cells.keys = torch.from_numpy(keys.view(np.int64))
    cells.step, cells.first_slot = step, first_slot
    return TrajectoryBatch.of_grids(cells, grids, mixing)


class TrajectoryLoader:
    """The batches of one rank, step by step and without end; to resume, give the number of the step.

    The cells of one window of each lane are in memory, packed, and a thread reads those of the next windows, of all
    lanes together.

    Parameters
    ----------
    reader
        What reads the cells.
    order
        Which trajectories belong to which step.
    seed
        Seed of the cells' random keys.
    rank, world
        This rank and how many there are; they divide the trajectories of a global batch.
    micro_batch
        Trajectories per forward pass.
    prefetch
        Steps that are read ahead.
    mixing
        What trajectories are moved by; None: nothing.
    """

    def __init__(
        self,
        reader: CountReader,
        order: PooledTrajectories,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        micro_batch: int,
        prefetch: int = 4,
        mixing: Mixing | None = None,
    ) -> None:
        self.mixing = mixing
        share = order.batch // world
        assert order.batch == share * world, "checked with the configuration"
        assert share % micro_batch == 0, "checked with the configuration"
        self.reader, self.order, self.seed, self.prefetch = reader, order, seed, prefetch
        self._slices = [(a, a + micro_batch) for a in range(rank * share, (rank + 1) * share, micro_batch)]
        self._pools: dict[Key, tuple[Future[list[Pool]], int]] = {}  # which of the pools that are read together
        self._thread: ThreadPoolExecutor | None = None
        self._stop = threading.Event()

    def steps(self, start: int = 0) -> Generator[list[TrajectoryBatch]]:
        """Yield the micro batches of each step from ``start`` on, read ahead by a thread."""
        self._stop.clear()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bgen-pools")
        ahead = run_ahead(self.read, start, self.prefetch)
        try:
            while True:  # not "yield from", which would close it before the reading of pools has stopped
                yield next(ahead)
        finally:
            self._stop.set()
            self._thread.shutdown(wait=False, cancel_futures=True)
            ahead.close()
            self._thread.shutdown()

    def read(self, step: int) -> list[TrajectoryBatch]:
        """Read the micro batches of one step."""
        runs = [self.order.runs(step, low, high) for low, high in self._slices]
        needed = list(dict.fromkeys(run.window for slice_runs in runs for run in slice_runs))
        if any(key not in self._pools for key in needed):
            self._fill(needed)
        size = self.order.times * self.order.cells
        batches = []
        for (low, high), slice_runs in zip(self._slices, runs, strict=True):
            keys = hash_keys(self.seed, _TRAIN, step, np.arange(low * size, high * size))
            grids = [self.order.window(run.window).grids[run.start : run.stop] for run in slice_runs]
            pieces = [
                self._pool(run.window).pick(np.stack([grid.cells for grid in some]).reshape(-1))
                for run, some in zip(slice_runs, grids, strict=True)
            ]
            whole = [(piece, 0, len(piece.cells)) for piece in pieces]
            cells = self.reader.pack(whole, keys, step, low * size).to_csr()
            batches.append(TrajectoryBatch.of_grids(cells, [grid for some in grids for grid in some], self.mixing))
        self._turn_pages({key[1]: key for key in sorted(needed)})
        return batches

    def _turn_pages(self, last: dict[int, Key]) -> None:
        """Forget the pools before the ``last`` of each lane; once all lanes have turned, start to read the next."""
        for key in [key for key in self._pools if key[1] not in last or key < last[key[1]]]:
            self._pools.pop(key)
        coming = [self.order.next_window(key) for key in last.values()]
        if self._thread is not None and not any(key in self._pools for key in coming):
            self._fill(coming)

    def _fill(self, keys: list[Key]) -> None:
        """Read the pools of some windows, if they are not there: together, so that each chunk is read once."""
        keys = [key for key in keys if key not in self._pools]
        if not keys:
            return
        cells = [self.order.window(key).cells for key in keys]
        if self._thread is not None:
            together = self._thread.submit(read_pools, self.reader, cells, self._stop.is_set)
        else:
            together = Future()
            together.set_result(read_pools(self.reader, cells))
        self._pools.update({key: (together, number) for number, key in enumerate(keys)})

    def _pool(self, key: Key) -> Pool:
        together, number = self._pools[key]
        return together.result()[number]


def valid_trajectories(
    reader: CountReader, order: TrajectoryOrder, *, seed: int, cells: int, micro_batch: int, rank: int, world: int
) -> list[tuple[CellBatch, Tensor]]:
    """Read this rank's share of the held-out trajectories: each once, then again with other cells, up to ``cells``.

    Parameters
    ----------
    order
        Order of the held-out split; its batch size is not used.
    cells
        Places of cells, B T N, over all ranks, at most; at least one trajectory is read.
    micro_batch
        Trajectories per forward pass, at most.

    Returns
    -------
    list
        Pairs of a batch and a weight ``[B T N]``: as many on each rank, all of the same size. Padding has weight 0.
    """
    size = order.times * order.cells
    n = max(1, cells // size)
    per_step = min(micro_batch, -(-n // world)) * world
    batches: list[tuple[CellBatch, Tensor]] = []
    for start in range(0, n, per_step):
        at = start + np.arange(rank * per_step // world, (rank + 1) * per_step // world)
        grids = [order.at(int(position)) for position in np.minimum(at, n - 1)]
        slots = (at[:, None] * size + np.arange(size)).reshape(-1)
        batch = read_batch(reader, grids, hash_keys(seed, _VALID, slots), 0, int(at[0]) * size)
        batches.append((batch, torch.from_numpy(np.repeat(at < n, size).astype(np.float32))))
    return batches
