"""Write a store: all or nothing (its layout: :mod:`bgen.store.store`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pandas as pd
import tensorstore as ts
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.errors import UserError
from bgen.genes.table import hash_genes, write_genes
from bgen.order.groups import parts
from bgen.progress import Count
from bgen.store.format.columns import MAX_CATEGORIES, MOST_WIDTH, column_metadata, describe_column, obs_path
from bgen.store.format.manifest import Column, Manifest, Source, hash_folder
from bgen.store.store import array_spec
from data_tools.building.order import shuffled
from data_tools.building.partial import WORK, all_or_nothing, save_array
from data_tools.building.pieces import CountRows, Piece, cut_rows
from data_tools.building.run_tasks import InProcess, Runner
from data_tools.building.shuffle import (
    CELLS_PER_CHUNK,
    Layout,
    Spill,
    measure,
    read_shard_files,
    row_sizes,
    spill,
    write_shard,
)
from data_tools.cells.barcodes import Barcodes, barcodes_of
from data_tools.cells.columns import Table
from data_tools.cells.mapped import fill as fill_array

Stages = Callable[[str, int, int], None]
"""Called with what is being done, cells done, cells in all."""


@dataclass(frozen=True, eq=False)
class Contents:
    """What goes into a store.

    Attributes
    ----------
    counts
        ``[n_cells, n_genes]``, or pieces of the input, of whose rows ``kept`` are the cells. They are read once, in
        order.
    genes
        Columns id, symbol.
    obs
        Columns of any kind; the index holds the barcodes, unless ``names`` does.
    split
        uint8 ``[n_cells]``: code of the split, a place in ``splits``.
    source, row
        ``[n_cells]``: input file (a place in ``sources``) and row in it.
    kept
        int64 ``[n_cells]``: number of each cell among the rows of all pieces; None: all of them are cells.
    names
        Barcodes; None: those of ``obs``.
    """

    counts: CountRows | Sequence[Piece]
    genes: pd.DataFrame
    obs: Table
    split: NDArray[np.uint8]
    splits: list[str]
    source: NDArray[np.int32]
    row: I64
    sources: list[Source]
    organism: str
    roles: Mapping[str, str]
    units: Mapping[str, str] = field(default_factory=dict)
    control: str | None = None
    split_by: str | None = None
    held_out: Mapping[str, list[str]] = field(default_factory=dict)
    vocabulary: str = "union"
    kept: I64 | None = None
    names: Barcodes | None = None

    def pieces(self) -> Sequence[Piece]:
        """Return the counts in pieces."""
        return self.counts if isinstance(self.counts, Sequence) else cut_rows(self.counts)

    def order(self, seed: int) -> I64:
        """Return int64 ``[n_cells]``: which cell comes at each place of the store.

        By split, then by population, in a keyed random order within it, so that a population is one contiguous read and
        a static epoch is a shuffle of chunks.
        """
        if "population" not in self.roles:
            return shuffled(self.split, None, seed)
        values = self.obs[self.roles["population"]]
        if isinstance(values.dtype, pd.CategoricalDtype):
            return shuffled(self.split, values.array.codes, seed)
        return shuffled(self.split, pd.factorize(values, sort=True)[0], seed)


def write_store(
    folder: Path, contents: Contents, *, profile: str, seed: int, created_by: str, progress: Count | None = None
) -> Manifest:
    """Write a store of counts in memory (or drawn, or read by rows), and return its manifest.

    The files are written beside ``folder``, checked into a manifest and moved in place at the end: a store that was not
    finished is never there.

    Raises
    ------
    UserError
        If ``folder`` is there and not empty, or the disk is full.
    """

    def report(what: str, done: int, cells: int) -> None:
        if progress and what == "writing":
            progress(done, cells)

    with all_or_nothing(folder) as partial:
        return fill(partial, contents, profile=profile, seed=seed, created_by=created_by, progress=report)


def fill(
    folder: Path,
    contents: Contents,
    *,
    profile: str,
    seed: int,
    created_by: str,
    progress: Stages,
    runner: Runner | None = None,
) -> Manifest:
    """Write everything of a store into the folder that :func:`data_tools.building.partial.all_or_nothing` gave.

    Finished work of an interrupted call is used again; the runner of the tasks makes no difference to the store.
    """
    runner = runner or InProcess()
    work, order = folder / WORK, contents.order(seed)
    for name in ("spills", "shards"):
        (work / name).mkdir(exist_ok=True)
    pieces = contents.pieces()
    spills = [Spill(folder, number) for number in range(len(pieces))]
    _save_places(work, contents, order, sum(piece.rows for piece in pieces))

    # work is counted in rows, so that the message says how many rows are done
    rows = [piece.rows for piece in pieces]
    runner.run(spill, list(zip(pieces, spills, strict=True)), rows, lambda done, all: progress("reading", done, all))
    expressed = np.zeros(len(contents.genes), np.int64)
    for one in spills:
        expressed += np.load(one.path("expressed"))
    gene_order = np.argsort(-expressed, kind="stable")
    save_array(work / "rank.npy", np.argsort(gene_order).astype(np.int32))
    runner.run(measure, [(one,) for one in spills], rows, lambda done, all: progress("measuring", done, all))

    sizes = row_sizes(spills, len(order))
    nonzeros, gap_bytes, overflow = sizes
    layout, first_cell = _lay_out(sizes, profile)
    save_array(work / "first_cell.npy", first_cell)
    for name, room in layout.rooms().items():
        try:
            ts.open({**array_spec(folder / name, layout.metadata(room)), "open": True}).result()
        except ValueError as error:  # how tensorstore says that a disk is full
            raise OSError(str(error)) from None
    edges = first_cell[np.minimum(np.arange(layout.n_shards + 1) * layout.shard_chunks, layout.n_chunks)]
    runner.run(
        write_shard,
        [(folder, number, spills, layout) for number in range(layout.n_shards)],
        np.diff(edges).tolist(),
        lambda done, all: progress("writing", done, all),
    )

    write_array(folder / "rows/genes", _smallest(nonzeros))
    write_array(folder / "rows/gap_bytes", _smallest(gap_bytes))
    write_array(folder / "rows/overflow", _smallest(overflow))
    write_array(folder / "rows/first_cell", first_cell)
    for name, values, dtype in (
        ("rows/split", contents.split, contents.split.dtype),
        ("origin/source", contents.source, np.dtype(np.int32)),
        ("origin/row", contents.row, np.dtype(np.int64)),
    ):
        _write_ordered(folder / name, dtype, values.__getitem__, order)
    _write_names(folder / "origin/name", contents.names or barcodes_of(contents.obs.index), order)
    columns, left_out = _write_obs(folder, contents.obs, order)
    if lost := [f"{role} ({column})" for role, column in contents.roles.items() if column not in columns]:
        raise UserError(
            f"A store keeps at most {MAX_CATEGORIES:,} different texts of a column; more would lose {', '.join(lost)}."
        )
    genes = contents.genes.iloc[gene_order].assign(cells=expressed[gene_order])
    write_genes(genes, folder)

    shards = {}
    for number in range(layout.n_shards):
        shards.update(read_shard_files(folder, number) or {})
    manifest = Manifest(
        created_by=created_by,
        profile=profile,
        organism=contents.organism,
        n_cells=len(order),
        n_genes=len(genes),
        n_nonzeros=int(nonzeros.sum(dtype=np.int64)),
        n_chunks=layout.n_chunks,
        gap_bytes=layout.gap_room,
        count_bytes=layout.count_room,
        genes_sha256=hash_genes(genes["id"].tolist()),
        columns=columns,
        roles=dict(contents.roles),
        left_out=left_out,
        units=dict(contents.units),
        control=contents.control,
        split_by=contents.split_by,
        held_out=dict(contents.held_out),
        vocabulary=contents.vocabulary,
        splits={name: int(np.count_nonzero(contents.split == code)) for code, name in enumerate(contents.splits)},
        seed=seed,
        sources=contents.sources,
        files=hash_folder(folder, known=shards, leave_out=WORK),
    ).with_fingerprint()
    manifest.write(folder)
    return manifest


def write_array(path: Path, values: NDArray[Any]) -> None:
    """Write an array with one entry (or row) a cell, over what an interrupted build may have left there."""
    array = open_array(path, values)
    for part in parts(len(values)):
        write_part(array, part, values[part])


def _write_ordered(path: Path, dtype: np.dtype[Any], values: Callable[[I64], NDArray[Any]], order: I64) -> None:
    """Write what is there of each cell in the order of the store, a part of the cells at a time."""
    array = open_array(path, np.broadcast_to(np.zeros((), dtype), order.shape))
    for part in parts(len(order)):
        write_part(array, part, values(order[part]).astype(dtype, copy=False))


def open_array(path: Path, like: NDArray[Any]) -> ts.TensorStore:
    """Make an array of the shape and type of ``like``, over what an interrupted build may have left there."""
    spec = {**array_spec(path, column_metadata(like)), "delete_existing": True}
    try:
        return ts.open(spec).result()
    except ValueError as error:  # how tensorstore says that a disk is full
        raise OSError(str(error)) from None


def write_part(array: ts.TensorStore, part: slice, values: NDArray[Any]) -> None:
    """Write entries (or rows) of an array."""
    try:
        array[part].write(np.ascontiguousarray(values)).result()
    except ValueError as error:  # how tensorstore says that a disk is full
        raise OSError(str(error)) from None


def _save_places(work: Path, contents: Contents, order: I64, n_rows: int) -> None:
    """Write for every row of the input its place in the store, -1 = left out, where the tasks look it up."""
    place = fill_array(n_rows, np.int64, lambda part: np.full(part.stop - part.start, -1))
    for part in parts(len(order)):
        rows = order[part] if contents.kept is None else contents.kept[order[part]]
        place[rows] = np.arange(part.start, part.stop)
    save_array(work / "place.npy", place)
    save_array(work / "n_genes.npy", len(contents.genes))


def _lay_out(sizes: NDArray[np.uint32], profile: str) -> tuple[Layout, I64]:
    """Return how the streams are cut, and the first cell of each chunk (see :func:`row_sizes` for ``sizes``)."""
    nonzeros, gap_bytes, overflow = sizes
    gap_room = _room(gap_bytes)
    count_room = _room(
        fill_array(len(nonzeros), np.int64, lambda part: nonzeros[part] + np.int64(4) * overflow[part] + 3)
    )
    first_cell = _fill_chunks(nonzeros, gap_bytes, overflow, gap_room, count_room)
    return Layout(gap_room, count_room, len(first_cell) - 1, profile), first_cell


def _room(sizes: NDArray[np.integer[Any]]) -> int:
    """Return the bytes of a chunk: enough for 256 usual cells, and for the largest one."""
    return max(int(np.ceil(sizes.mean(dtype=np.float64) * CELLS_PER_CHUNK * 1.02)), int(sizes.max()), 4)


@numba.njit(cache=True)
def _fill_chunks(
    nonzeros: NDArray[np.uint32],
    gap_bytes: NDArray[np.uint32],
    overflow: NDArray[np.uint32],
    gap_room: int,
    count_room: int,
) -> I64:
    """Return int64 ``[n_chunks + 1]``: the first cell of each chunk, as many whole cells as fit."""
    first = [0]
    gaps = counts = spilt = np.int64(0)
    for cell in range(len(nonzeros)):
        gaps += np.int64(gap_bytes[cell])
        counts += np.int64(nonzeros[cell])
        spilt += np.int64(4) * np.int64(overflow[cell])
        if gaps > gap_room or -(-counts // 4) * 4 + spilt > count_room:
            first.append(cell)
            gaps, counts = np.int64(gap_bytes[cell]), np.int64(nonzeros[cell])
            spilt = np.int64(4) * np.int64(overflow[cell])
    first.append(len(nonzeros))
    return np.array(first, dtype=np.int64)


def _write_names(path: Path, barcodes: Barcodes, order: I64) -> None:
    """Write barcodes ``[N]`` in the order of the store as UTF-8, a part of them at a time: they are large.

    Raises
    ------
    UserError
        If one is too long.
    """
    width = barcodes.width()
    if width > MOST_WIDTH:
        raise UserError(f"A barcode has {width:,} bytes; a store keeps at most {MOST_WIDTH:,} of each.")
    array = open_array(path, np.broadcast_to(np.uint8(0), (len(order), width)))
    for part in parts(len(order)):
        write_part(array, part, barcodes.read(order[part], width))


def _write_obs(folder: Path, obs: Table, order: I64) -> tuple[dict[str, Column], list[str]]:
    """Write the columns of obs in the order of the store, one after the other.

    Returns
    -------
    dict[str, Column], list[str]
        What they are, and the names of those with too many distinct texts.
    """
    columns: dict[str, Column] = {}
    left_out = []
    for name in map(str, obs.columns):
        if (described := describe_column(obs[name])) is None:
            left_out.append(name)
            continue
        columns[name], values = described
        _write_ordered(folder / obs_path(name), values(slice(0, 0)).dtype, values, order)
    return columns, left_out


def _smallest(values: NDArray[np.integer[Any]]) -> NDArray[Any]:
    """Return non-negative integers in the smallest unsigned type that holds them."""
    kind = np.min_scalar_type(int(values.max(initial=0)))
    return fill_array(len(values), kind, lambda part: values[part].astype(kind))
