"""The external shuffle: from pieces of the input to the shards of a store, in tasks that any process can do.

1. :func:`spill` reads a piece once. It writes the cells, encoded in the vocabulary's gene order and sorted by their
   place in the store, and counts the cells that express each gene.
2. When all pieces are read, the order of the genes is known, and :func:`measure` finds how many bytes of gaps each cell
has in it. The chunks follow from that. 3. :func:`write_shard` collects a shard's cells from all spills, encodes them in
the final gene order, and writes the
   shard.

The result of a task is there whole or not at all, so only tasks that were killed are done again. What a store holds
depends neither on how the input was cut nor on what ran the tasks.

Axes: N cells of the store, G genes.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.errors import UserError
from bgen.store.format.manifest import File
from bgen.store.format.recode import encode_rows, gather, recode_chunks, recoded_gap_bytes
from bgen.store.format.shards import compress, shard_path
from bgen.store.format.shards import write_shard as write_shard_file
from bgen.store.store import stream_metadata
from data_tools.building.partial import WORK, commit, save_array
from data_tools.building.pieces import Piece
from data_tools.cells.mapped import room

CELLS_PER_CHUNK = 256
SHARD_BYTES = 128 << 20
"""Bytes of a shard in one stream, uncompressed, at most; its cells are in memory while it is written."""

CHUNKS_AT_ONCE = 16

SHARD_CHUNKS = 256
"""Chunks of a shard, at most."""


@dataclass(frozen=True)
class Spill:
    """Where the result of a piece lies."""

    folder: Path
    number: int

    def path(self, what: str) -> Path:
        """Return one of its files."""
        return self.folder / WORK / "spills" / f"{self.number:05d}.{what}"

    def is_done(self) -> bool:
        """Whether the piece was read and all of its files are whole."""
        try:
            sizes = json.loads(self.path("json").read_text(encoding="utf-8"))
            return all(self.path(name).stat().st_size == size for name, size in sizes.items())
        except (OSError, ValueError):
            return False

    def cells(self) -> I64:
        """Return int64: places of its cells in the store, ascending."""
        return np.load(self.path("cells"), mmap_mode="r")

    def starts(self) -> I64:
        """Return int64 ``[cells + 1, 3]``: where its gaps, counts and overflow begin, in bytes of the stream."""
        return np.load(self.path("starts"), mmap_mode="r")

    def read(self, low: int, high: int) -> list[NDArray[np.uint8]]:
        """Return the three streams of its cells ``low:high``."""
        starts = self.starts()
        ends = starts[-1]
        found = []
        with self.path("streams").open("rb") as stream:
            for which in range(3):
                first, last = int(starts[low, which]), int(starts[high, which])
                stream.seek(int(ends[:which].sum()) + first)
                found.append(np.fromfile(stream, np.uint8, last - first))
                if len(found[-1]) != last - first:
                    raise UserError(f"{self.path('streams')} was cut off. Build again with --restart.")
        return found


@dataclass(frozen=True)
class Layout:
    """How the streams of a store are cut.

    Attributes
    ----------
    gap_room, count_room
        Bytes of a chunk.
    n_chunks
        Chunks.
    shard_chunks
        Chunks of a shard.
    profile
        Codec profile.
    """

    gap_room: int
    count_room: int
    n_chunks: int
    profile: str

    @property
    def shard_chunks(self) -> int:
        """Chunks of a shard: fewer where chunks are large, so that a shard fits in memory."""
        return max(1, min(SHARD_CHUNKS, SHARD_BYTES // max(self.gap_room, self.count_room)))

    @property
    def n_shards(self) -> int:
        """Shards."""
        return -(-self.n_chunks // self.shard_chunks)

    def metadata(self, room: int) -> dict[str, Any]:
        """Return the zarr metadata of a stream."""
        metadata = stream_metadata(self.n_chunks, room, self.profile)
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = [self.shard_chunks, room]
        return metadata

    def rooms(self) -> dict[str, int]:
        """Return the bytes of a chunk by stream."""
        return {"gaps": self.gap_room, "counts": self.count_room}


def spill(piece: Piece, to: Spill) -> None:
    """Read a piece and write its cells, encoded and sorted by their place in the store."""
    if to.is_done():
        return
    gene_map = piece.gene_map()
    n_genes = int(np.load(to.folder / WORK / "n_genes.npy"))
    expressed = np.zeros(n_genes, np.int64)
    places: list[I64] = []
    parts: list[tuple[NDArray[Any], ...]] = []
    for block in piece.blocks():
        n_rows, entries = len(block.indptr) - 1, len(block.counts)
        there = _load_part(to.folder / WORK / "place.npy", block.start, block.start + n_rows)
        gaps = np.empty(entries + n_rows * (n_genes // 255 + 1), np.uint8)
        counts, overflow = np.empty(entries, np.uint8), np.empty(entries, np.uint32)
        sizes = np.zeros((n_rows, 3), np.int64)
        bad = encode_rows(
            block.indptr, block.columns, block.counts, gene_map, there >= 0, expressed, gaps, counts, overflow, sizes
        )
        if bad >= 0:
            raise UserError(f"{piece.what}: the counts of a gene in row {block.start + bad} add up to 2^32 or more.")
        used = sizes.sum(0)
        places.append(there[there >= 0])
        parts.append((gaps[: used[0]].copy(), counts[: used[1]].copy(), overflow[: used[2]].copy(), sizes[there >= 0]))
    _write_spill(to, np.concatenate(places), [np.concatenate(part) for part in zip(*parts, strict=True)], expressed)


def _write_spill(to: Spill, places: I64, parts: list[NDArray[Any]], expressed: I64) -> None:
    """Write streams and sizes (bytes of gaps, bytes of counts, entries of overflow) of cells, sorted by their place."""
    *streams, sizes = parts
    sizes = sizes * [1, 1, 4]
    begins = np.cumsum(sizes, axis=0) - sizes
    order = np.argsort(places)
    starts = np.zeros((len(places) + 1, 3), np.int64)
    np.cumsum(sizes[order], axis=0, out=starts[1:])
    to.path("json").parent.mkdir(exist_ok=True)
    with _whole_file(to.path("streams"), to.folder) as half, half.open("wb") as file:
        for which, stream in enumerate(streams):
            line = stream.view(np.uint8)
            out = np.empty(len(line), np.uint8)
            gather(line, begins[order, which], sizes[order, which], out)
            file.write(out.data)
    for name, array in (("cells", places[order]), ("starts", starts), ("expressed", expressed)):
        save_array(to.path(name), array)
    names = ("streams", "cells", "starts", "expressed")
    commit(to.path("json"), json.dumps({name: to.path(name).stat().st_size for name in names}).encode())


def measure(of: Spill) -> None:
    """Write the bytes of gaps of a spill's cells in the final gene order."""
    if of.path("gap_bytes").exists():
        return
    starts = np.ascontiguousarray(of.starts()[:, 0])
    gaps = np.memmap(of.path("streams"), np.uint8, "r", shape=(int(starts[-1]),)) if starts[-1] else np.zeros(0, "u1")
    found = recoded_gap_bytes(np.asarray(gaps), starts, np.load(of.folder / WORK / "rank.npy"))
    del gaps
    commit(of.path("gap_bytes"), found.tobytes())


def row_sizes(spills: list[Spill], n_cells: int) -> NDArray[np.uint32]:
    """Return uint32 ``[3, N]``: genes expressed, bytes of gaps and entries of overflow of each cell of the store."""
    found = room((3, n_cells), np.uint32)
    for one in spills:
        cells, starts = one.cells(), np.asarray(one.starts())
        found[0, cells] = np.diff(starts[:, 1])
        found[1, cells] = np.fromfile(one.path("gap_bytes"), np.uint32)
        found[2, cells] = np.diff(starts[:, 2]) // 4
    return found


def write_shard(folder: Path, number: int, spills: list[Spill], layout: Layout) -> None:
    """Collect the cells of a shard and write it into both streams."""
    if read_shard_files(folder, number) is not None:
        return
    first_chunk = number * layout.shard_chunks
    last_chunk = min(first_chunk + layout.shard_chunks, layout.n_chunks)
    first_cell = _load_part(folder / WORK / "first_cell.npy", first_chunk, last_chunk + 1)
    streams, cells = _collect(spills, int(first_cell[0]), int(first_cell[-1]))
    rank = np.load(folder / WORK / "rank.npy")
    packed: dict[str, list[bytes]] = {"gaps": [], "counts": []}
    for chunk in range(0, last_chunk - first_chunk, CHUNKS_AT_ONCE):
        edges = first_cell[chunk : chunk + CHUNKS_AT_ONCE + 1] - first_cell[0]
        rows = {name: np.zeros((len(edges) - 1, room), np.uint8) for name, room in layout.rooms().items()}
        gaps, counts, overflow = streams[0], streams[1], streams[2].view(np.uint32)
        recode_chunks(gaps, counts, overflow, cells, edges, rank, rows["gaps"], rows["counts"])
        for name, block in rows.items():
            packed[name] += [compress(row, layout.profile) for row in block]
    files = {}
    for name, chunks in packed.items():
        path = shard_path(folder / name, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _whole_file(path, folder) as half:
            write_shard_file(half, chunks, layout.shard_chunks)
            with half.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    commit(_shard_note(folder, number), json.dumps(files).encode())


def _load_part(path: Path, start: int, stop: int) -> NDArray[Any]:
    """Return entries of a .npy file, and leave it closed: an open map would hold its room on a disk that is full."""
    return np.array(np.load(path, mmap_mode="r")[start:stop])


@contextmanager
def _whole_file(path: Path, folder: Path) -> Iterator[Path]:
    """Give a place to write a file, which is moved to ``path`` when it is whole and on the disk.

    After a build was killed, one of its workers may still be at a task while another does it again: both write the same
    bytes, each in a place of its own.
    """
    half = folder / WORK / "halves" / f"{path.name}-{uuid.uuid4().hex}"
    half.parent.mkdir(exist_ok=True)
    try:
        yield half
        with half.open("rb") as stream:
            os.fsync(stream.fileno())
        half.rename(path)
    finally:
        half.unlink(missing_ok=True)


def read_shard_files(folder: Path, number: int) -> dict[str, File] | None:
    """Return size and checksum of a shard's two files as they were written; None if they are not there and whole."""
    try:
        tree = json.loads(_shard_note(folder, number).read_text(encoding="utf-8"))
        files = {name: File.model_validate(file) for name, file in tree.items()}
        return files if all((folder / name).stat().st_size == file.bytes for name, file in files.items()) else None
    except (OSError, ValueError):
        return None


def _shard_note(folder: Path, number: int) -> Path:
    return folder / WORK / "shards" / f"{number:05d}.json"


def _collect(spills: list[Spill], first: int, last: int) -> tuple[list[NDArray[np.uint8]], I64]:
    """Return the streams of the cells ``first:last`` and where they lie in them (see :func:`recode_chunks`)."""
    cells = np.empty((last - first, 4), np.int64)
    parts: list[list[NDArray[np.uint8]]] = [[], [], []]
    filled = np.zeros(3, np.int64)
    for one in spills:
        places = one.cells()
        low, high = np.searchsorted(places, [first, last])
        if low == high:
            continue
        starts = np.asarray(one.starts()[low : high + 1])
        at = np.asarray(places[low:high]) - first
        cells[at, :3] = starts[:-1] - starts[0] + filled
        cells[at, 2] //= 4
        cells[at, 3] = np.diff(starts[:, 1])
        for part, stream in zip(parts, one.read(int(low), int(high)), strict=True):
            part.append(stream)
        filled += starts[-1] - starts[0]
    return [np.concatenate(part) if part else np.zeros(0, np.uint8) for part in parts], cells
