"""Work on cells a block at a time: on any number of ranks, and again where it was stopped.

A block is a fixed range of cells. What is made of it depends on the model and on its cells alone, so any number of
ranks gives the same, and a run that was killed goes on with the blocks that are not done. Each rank takes neighbouring
blocks, writes the chunks that are theirs, has them on the disk, and then a small file says that the block is done.

Axes: N cells.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.distributed import world as ranks
from bgen.errors import UserError
from bgen.files import require_local
from bgen.progress import Progress
from bgen.tasks.blocks.cells import Batch, BlockCells
from bgen.tasks.blocks.folder import Folder, Room, Writer
from bgen.tasks.user_cells import Matched
from data_tools.building.partial import WORK, Interrupted, Plan, all_or_nothing, commit

MOST_ROWS, LEAST_ROWS = 32_768, 256
"""Cells of a block, powers of two."""

SHARES = 64
"""Blocks that even few cells are cut into, so that many ranks have something to do."""

BATCH = 1_024
"""Cells of a forward pass."""

WEEK = 7 * 86_400.0
"""Seconds that ranks wait for the slowest of them."""

Found = TypeVar("Found")


class BlockVerb(ABC):
    """What is made of each batch of cells.

    Attributes
    ----------
    what
        What the progress bar calls it.
    cells
        The cells.
    rooms
        What is written, by path.
    var
        Genes of the result.
    """

    what: str
    cells: BlockCells
    rooms: Mapping[str, Room]
    var: pd.DataFrame

    @abstractmethod
    def of_batch(self, batch: Batch) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
        """Return what is written of a batch, by path, and numbers that are added up over all cells."""

    @abstractmethod
    def uns(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """Return what ``uns`` says, from the sums over all cells."""


@dataclass(frozen=True)
class Done:
    """A run that ended: its verb, sums over all cells, and what ``uns`` says."""

    verb: BlockVerb
    sums: dict[str, float]
    uns: dict[str, Any]

    @property
    def matched(self) -> Matched:
        """What of the cells the model knows."""
        return replace(self.verb.cells.matched, molecules=self.sums["known"] / max(self.sums["molecules"], 1.0))


def rows_of_block(n: int) -> int:
    """Return how many of ``n`` cells a block holds."""
    rows = MOST_ROWS
    while rows > LEAST_ROWS and rows * SHARES > n:
        rows //= 2
    return rows


def write_in_blocks(
    out: Path,
    plan: Plan,
    prepare: Callable[[], BlockVerb],
    *,
    restart: bool = False,
    progress: Progress | None = None,
) -> Done:
    """Write what a verb makes of all cells as AnnData in zarr; every rank calls this alike.

    Parameters
    ----------
    out
        New folder; it appears when it is complete. Until then the work is in ``.<name>.partial`` beside it.
    plan
        What the result depends on.
    prepare
        Called on every rank; returns the verb. What only rank 0 should do it does by :func:`once`.
    restart
        Throw away what another run left.

    Raises
    ------
    UserError
        If ``out`` is there, another run left something, or the input is wrong; it is
        :class:`data_tools.building.partial.Interrupted` where the work is kept.
    """
    require_local(out)
    world = ranks.current()
    with ExitStack() as stack:
        place = once(lambda: stack.enter_context(all_or_nothing(out, plan, restart=restart, what="run")))
        verb = together(prepare)
        rows = rows_of_block(len(verb.cells))
        folder = Folder(place, len(verb.cells), rows, min(rows, BATCH), verb.rooms)
        done = place / WORK / "done"

        def begin() -> list[int]:
            if not done.is_dir():
                folder.create(verb.cells, verb.var)
                done.mkdir()
            ready = {int(path.stem) for path in done.glob("*.json")}
            return [block for block in range(-(-folder.n // rows)) if block not in ready]

        left = once(begin)
        share = [int(block) for block in np.array_split(np.array(left, np.int64), world.size)[world.rank]]

        def work() -> None:
            try:
                _work(verb, folder, done, share, progress if world.is_main else None)
            except Interrupted:
                raise
            except (UserError, OSError) as error:
                raise Interrupted(str(error)) from None  # what is done is not lost by one block

        together(work)
        sums: Counter[str] = Counter()

        def end() -> tuple[dict[str, float], dict[str, Any]]:
            for block in range(-(-folder.n // rows)):
                sums.update(json.loads((done / f"{block}.json").read_text(encoding="utf-8")))
            if sums["known"] == 0:
                raise UserError(
                    f"No cell has a count of a gene that the model knows: {verb.cells.matched.matrix} holds"
                    f" {sums['molecules']:,.0f} molecules. Is it the matrix of counts (--counts)?"
                )
            uns = verb.uns(sums)
            folder.finish(uns)
            stack.close()
            return dict(sums), uns

        return Done(verb, *once(end))


def once(do: Callable[[], Found]) -> Found:
    """Return on every rank what rank 0 does; a user's mistake that it meets is raised on every rank."""
    found: Found | None = None
    error: UserError | OSError | None = None
    if ranks.current().is_main:
        try:
            found = do()
        except (UserError, OSError) as met:
            error = met
    found, error = ranks.from_main((found, error))
    if error is not None:
        raise error
    return found  # type: ignore[return-value]


def together(do: Callable[[], Found]) -> Found:
    """Do something on every rank; a user's mistake that one of them meets is raised on every rank."""
    found: Found | None = None
    error: UserError | OSError | None = None
    try:
        found = do()
    except (UserError, OSError) as met:
        error = met
    if first := next((met for met in ranks.gather(error) if met is not None), None):
        raise first
    return found  # type: ignore[return-value]


def _work(verb: BlockVerb, folder: Folder, done: Path, share: list[int], progress: Progress | None) -> None:
    """Do some blocks, one run of neighbours after another."""
    writer = Writer(folder)
    for run in np.split(np.array(share, np.int64), np.flatnonzero(np.diff(share) > 1) + 1):
        if not len(run):
            continue
        start, stop = int(run[0]) * folder.block, min((int(run[-1]) + 1) * folder.block, folder.n)
        held: dict[str, list[NDArray[Any]]] = {where: [] for where in folder.rooms}
        sums: Counter[str] = Counter()
        for batch in verb.cells.batches(start, stop, folder.batch):
            made, numbers = verb.of_batch(batch)
            last = batch.first + batch.counts.shape[0]
            for where, values in made.items():
                if folder.is_wide(where):
                    writer.write(where, batch.first, values)
                else:
                    held[where].append(values)
            sums.update({"molecules": batch.molecules, "known": float(batch.counts.sum(dtype=np.float64)), **numbers})
            if last % folder.block and last < folder.n:
                continue
            block = (last - 1) // folder.block
            first = block * folder.block
            for where, parts in held.items():
                if parts:
                    writer.write(where, first, np.concatenate(parts))
            verb.cells.write_rows(writer, first, last)
            writer.sync(first, last)
            commit(done / f"{block}.json", json.dumps(sums).encode())
            held, sums = {where: [] for where in folder.rooms}, Counter()
            if progress is not None:
                progress(verb.what, min(len(list(done.glob("*.json"))) * folder.block, folder.n), folder.n)
