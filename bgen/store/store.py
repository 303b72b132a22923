"""A store, opened for reading: where its parts lie, and how every byte of them is checked.

::

    store/
      manifest.json       what is in it, checksum of every file; written last
      genes.csv           gene ids in the store's order
      gaps/, counts/      zarr v3 uint8 [n_chunks, bytes]: a row is a chunk of whole cells (bgen/store/format/codec.py)
      rows/genes          zarr v3 uint [n_cells]: expressed genes, which is bytes of counts
      rows/gap_bytes      zarr v3 uint [n_cells]
      rows/overflow       zarr v3 uint [n_cells]: counts of 255 and more
      rows/first_cell     zarr v3 int64 [n_chunks + 1]: number of each chunk's first cell
      rows/split          zarr v3 uint [n_cells]: code of the split
      obs/<column>        zarr v3 int32 codes or numbers [n_cells]
      origin/source, row  zarr v3 int32, int64 [n_cells]: input file and row in it
      origin/name         zarr v3 uint8 [n_cells, width]: barcodes in UTF-8, padded with zeros
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.config.data import Access
from bgen.errors import Unreachable, UserError, nearest
from bgen.genes.table import NAME as GENES
from bgen.genes.table import hash_genes, parse_genes
from bgen.order.cells import Cells, Members, Order, numbers
from bgen.order.groups import parts
from bgen.order.sample import sample
from bgen.store.arena import Arena
from bgen.store.format.codec import PROFILES, find_wrong_sizes, locate_rows
from bgen.store.format.columns import ROWS_CHUNK, count_chunks, obs_path, read_array
from bgen.store.format.manifest import Column, Manifest, check_files, read_checked, read_manifest
from bgen.store.format.shards import CHUNKS_PER_TASK, Stream, read_ahead
from bgen.store.host import Fill, HostArrays

AHEAD = 2
"""Windows that a rank reads ahead from a local disk."""

SHARD_CHUNKS = 256


def array_spec(path: Path, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the tensorstore spec of a zarr v3 array on this machine's file system."""
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return spec if metadata is None else {**spec, "metadata": metadata, "create": True}


def stream_metadata(n_chunks: int, chunk_bytes: int, profile: str) -> dict[str, Any]:
    """Return the zarr v3 metadata of a byte stream: one row a chunk, shards of 256 chunks, a CRC-32C per chunk."""
    checked = [{"name": "bytes"}, *PROFILES[profile], {"name": "crc32c"}]
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [1, chunk_bytes], "codecs": checked, "index_codecs": index}
    return {
        "shape": [n_chunks, chunk_bytes],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD_CHUNKS, chunk_bytes]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "fill_value": 0,
    }


class Store:
    """A store, opened for reading.

    What is held of every cell, the processes of a machine share (:mod:`bgen.store.host`): numbers of its place, and the
    columns that are asked for.

    Opening reads the manifest, compares the size of every file with it, and reads the gene table and the few numbers
    per cell that say where it lies; counts are read when they are asked for. Whatever is read is what was written: the
    CRC-32C of a chunk of counts and the SHA-256 of any other file are compared each time. What the numbers per cell say
    is compared with one another, so that no store leads the compiled loops astray, whoever wrote it.

    Parameters
    ----------
    folder
        The store.
    threads
        Threads that decode chunks.
    access
        Names the cache folder.

    Raises
    ------
    UserError
        If there is no store, files are missing or have another size than was written, or they do not fit together.
    """

    def __init__(self, folder: str | Path, *, threads: int = 2, access: Access | None = None) -> None:
        self.folder = Path(folder)
        self._access = access or Access()
        self._held: WeakValueDictionary[str, NDArray[Any]] = WeakValueDictionary()
        self.manifest: Manifest = read_manifest(self.folder)
        if problems := self._find_damage():
            listed = "\n  ".join(problems[:10])
            raise UserError(f"The store {self.folder} is damaged:\n  {listed}\nRestore these files or build it again.")
        self._fetch(self._needed_to_open())
        self._genes_csv = self._load(GENES)
        self._read_rows()
        self._streams = self._open_streams()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bgen-decode")

    def __len__(self) -> int:
        return self.manifest.n_cells

    @functools.cached_property
    def genes(self) -> pd.DataFrame:
        """The gene table in the store's order (see :mod:`bgen.genes.table`).

        Raises
        ------
        UserError
            If it is not the one of the manifest.
        """
        try:
            genes = parse_genes(self._genes_csv)
            if hash_genes(genes["id"].tolist()) != self.manifest.genes_sha256 or len(genes) != self.manifest.n_genes:
                raise ValueError("its genes are not those of the manifest")
        except (ValueError, KeyError) as error:
            raise self.damaged(ValueError(f"{GENES}: {error}")) from None
        return genes

    @property
    def fingerprint(self) -> str:
        """What tells this store from every other one."""
        return self.manifest.fingerprint

    def column_name(self, name: str) -> str:
        """Return the column that ``name``, a column or a role, means.

        Raises
        ------
        UserError
            Naming the nearest one, if there is none.
        """
        column = self.manifest.roles.get(name, name)
        if column not in self.manifest.columns:
            choices = [*self.manifest.columns, *self.manifest.roles]
            raise UserError(f"The store {self.folder} has no column or role '{name}'.{nearest(name, choices)}")
        return column

    def column(
        self, name: str, rows: tuple[int, int] | None = None, *, cells: I64 | None = None
    ) -> tuple[Column, NDArray[Any]]:
        """Return what a column (or role) is and its values ``[n_cells]``: codes (-1 = missing) or numbers.

        Codes are of the smallest signed type that holds all categories. The array is shared with other processes and
        not to be written to.

        ``rows``: only those of the cells from the first to below the second, without reading the others; ``cells``:
        only those of some cells ``[n]``, without keeping the others.
        """
        column = self.column_name(name)
        about = self.manifest.columns[column]
        most = len(about.categories)

        def check(values: NDArray[Any]) -> NDArray[Any]:
            kind = "i4" if about.kind == "category" else "f4" if values.itemsize == 4 else "f8"
            if values.dtype != np.dtype(kind) or (kind == "i4" and not -1 <= values.min() <= values.max() < most):
                raise self.damaged(ValueError(f"{obs_path(column)} holds values that the manifest does not know"))
            return values.astype(code_type(most), copy=False) if kind == "i4" else values

        path = obs_path(column)
        return about, self._per_cell(path, check, rows) if cells is None else self._pick(path, check, cells)

    def shuffled_within(self) -> NDArray[Any] | None:
        """Return a value ``[n_cells]``: neighbours with the same one were put in random order, within their split.

        None: the order of the cells is not known to be random.
        """
        if "population" in self.manifest.roles:
            return self.column("population")[1]
        return np.broadcast_to(np.uint8(0), self.manifest.n_cells)

    def sample(self, cells: Cells, n: int, *key: int) -> I64:
        """Return min(n, all) of some cells that belong to ``key``, ascending (see :mod:`bgen.order.sample`)."""
        return sample(cells, n, self.first_cell, *key, whole=self._is_shuffled)

    @property
    def _is_shuffled(self) -> bool:
        """Whether the cells of a split are in random order."""
        return "population" not in self.manifest.roles

    def split(self, name: str) -> Cells:
        """Return the cells of a split: a range where they follow one another, else their numbers, ascending."""
        if name not in self.manifest.splits:
            raise UserError(f"The store {self.folder} has no split '{name}'.{nearest(name, self.manifest.splits)}")
        code = list(self.manifest.splits).index(name)
        if self._split_edges is not None:
            return range(int(self._split_edges[code]), int(self._split_edges[code + 1]))
        return np.flatnonzero(self.rows("split") == code)

    def cells_of_split(self, split: str) -> I64:
        """Return the numbers of the cells of a split, ascending: 8 bytes for each, where :meth:`split` needs none."""
        return numbers(self.split(split))

    @functools.cached_property
    def _split_edges(self) -> I64 | None:
        """First cell of each split, and the number of all; None: the cells are not sorted by split."""
        codes = self.rows("split")
        for part in parts(len(codes)):
            some = codes[part.start : part.stop + 1]
            if (some[1:] < some[:-1]).any():
                return None
        every = np.arange(len(self.manifest.splits)).astype(codes.dtype)  # of their type, or all would be copied
        return np.append(np.searchsorted(codes, every), len(codes))

    def order(self, split: str, *, batch: int, lanes: int, window: int, seed: int) -> Order:
        """Return the order of the cells of a split (see :class:`bgen.order.cells.Order`)."""
        cells = self.split(split)
        if len(cells) == 0:
            raise UserError(f"The split '{split}' of {self.folder} holds no cells.")
        name = f"{self.fingerprint}/{split}"
        return Order(Members.of(cells, self.first_cell), batch, lanes, window, seed, name)

    def read_chunks(self, chunks: I64, arena: Arena, slots: I64) -> list[Future[None]]:
        """Start to read chunks into slots of an arena, one each."""
        pairs = list(zip(self._streams, (arena.gaps, arena.counts), strict=True))
        try:
            return read_ahead(self._pool, pairs, chunks, slots, self.chunks_per_task)
        except (ValueError, OSError) as error:
            raise self.unread(error) from None

    @property
    def chunks_per_task(self) -> int:
        """Chunks that a thread reads one after another."""
        return CHUNKS_PER_TASK

    def windows_ahead(self, window: int) -> int:
        """Return how many windows of so many chunks a rank should read ahead."""
        return AHEAD

    def arena(self, slots: int) -> Arena:
        """Return room for so many chunks."""
        return Arena(slots, self.manifest.gap_bytes, self.manifest.count_bytes)

    def locate(self, cells: I64, chunks: I64, slots: I64) -> I64:
        """Return where cells lie in an arena with chunks in slots (see :func:`bgen.store.format.codec.locate_rows`)."""
        rooms = self.manifest.gap_bytes, self.manifest.count_bytes
        return locate_rows(
            cells, chunks, slots, self.first_cell, self.nonzeros, self._gap_bytes, self._overflow, *rooms
        )

    def damaged(self, error: Exception) -> UserError:
        """Turn an error of the read engine into a message that names the file."""
        return UserError(
            f"The store {self._where} cannot be read: {error}\n`bgen data verify {self.folder}` checks every file."
        )

    def unread(self, error: Exception) -> UserError:
        """Turn an error of the read engine into the one for users: what may go over is :class:`Unreachable`."""
        if isinstance(error, OSError):
            return Unreachable(f"The store {self._where} cannot be reached: {error}")
        return self.damaged(error)

    def source_of(self, cells: I64) -> tuple[NDArray[np.int32], I64]:
        """Return the input file (its place in the manifest) and the row in it of each cell."""
        return self._pick("origin/source", self._check_source, cells), self._pick("origin/row", self._check_row, cells)

    def origin(self, start: int, stop: int) -> tuple[NDArray[np.int32], I64]:
        """Return the same of the cells ``start:stop``, without reading the others."""
        rows = start, stop
        return (
            self._per_cell("origin/source", self._check_source, rows),
            self._per_cell("origin/row", self._check_row, rows),
        )

    def sources(self) -> NDArray[np.signedinteger[Any]]:
        """Return the input file of each cell ``[n_cells]``, in the smallest type, shared as a :meth:`column` is."""
        kind = code_type(len(self.manifest.sources))
        return self._per_cell("origin/source", lambda values: self._check_source(values).astype(kind, copy=False))

    def rows(self, name: str, rows: tuple[int, int] | None = None) -> NDArray[np.unsignedinteger[Any]]:
        """Return a number of every cell: "genes", "gap_bytes", "overflow", or "split", its split's code.

        ``rows`` as for :meth:`column`, and the array is shared as that is.
        """

        def check(values: NDArray[Any]) -> NDArray[Any]:
            if values.dtype.kind != "u" or values.ndim != 1:
                raise self.damaged(ValueError(f"rows/{name} is of another type than bgen writes"))
            if name == "split" and values.max() >= len(self.manifest.splits):
                raise self.damaged(ValueError("rows/split names splits that the manifest does not know"))
            return values

        return self._per_cell(f"rows/{name}", check, rows)

    def names(self, rows: tuple[int, int] | None = None, *, cells: I64 | None = None) -> NDArray[np.str_]:
        """Return the barcodes ``[n_cells]``; ``rows`` as for :meth:`column`, or only those of some ``cells [n]``."""

        def check(values: NDArray[Any]) -> NDArray[Any]:
            if values.dtype != np.uint8 or values.ndim != 2:
                raise self.damaged(ValueError("origin/name holds no texts"))
            return values

        path = "origin/name"
        raw = check(self._read_array(path, rows=rows)) if cells is None else self._pick(path, check, cells)
        try:
            return np.char.decode(np.ascontiguousarray(raw).view(f"S{raw.shape[1]}")[:, 0], "utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(error) from None

    def find_damaged_files(self) -> list[str]:
        """Read every byte and describe the files that are not as they were written."""
        return check_files(self.folder, self.manifest, checksums=True)

    def _find_damage(self) -> list[str]:
        """Describe the files that are not as they were written, as far as a quick look tells."""
        return check_files(self.folder, self.manifest, checksums=False)

    def _read_rows(self) -> None:
        """Read the numbers per cell that say where it lies.

        Raises
        ------
        UserError
            If they do not fit together.
        """
        about = self.manifest
        n_files = count_chunks("rows/genes", about.files)
        if not (0 < about.n_chunks <= about.n_cells and n_files == -(-about.n_cells // ROWS_CHUNK)):
            raise self.damaged(ValueError("rows/genes does not hold the cells of the manifest"))
        self.nonzeros, self._gap_bytes, self._overflow = (
            self.rows(name) for name in ("genes", "gap_bytes", "overflow")
        )
        self.first_cell: I64 = self._read_array("rows/first_cell", about.n_chunks + 1)
        problem = "rows/first_cell is of another type than bgen writes"
        if self.first_cell.dtype == np.int64 and self.first_cell.ndim == 1:
            sizes = self.first_cell, self.nonzeros, self._gap_bytes, self._overflow
            problem = find_wrong_sizes(*sizes, about.n_genes, about.gap_bytes, about.count_bytes)
        if problem:
            raise self.damaged(ValueError(f"rows: {problem}"))

    def _open_streams(self) -> list[Stream]:
        """Return what reads the chunks of gaps and of counts."""
        try:
            return [self._open_stream(name) for name in ("gaps", "counts")]
        except (ValueError, OSError) as error:
            raise self.unread(error) from None

    def _open_stream(self, name: str) -> Stream:
        self._load(f"{name}/zarr.json")
        stream = self._stream(name)
        if stream.room != (self.manifest.gap_bytes if name == "gaps" else self.manifest.count_bytes):
            raise ValueError(f"{name}/zarr.json does not describe what the manifest says")
        return stream

    def _stream(self, name: str) -> Stream:
        return Stream(self.folder / name, self.manifest.profile)

    @property
    def _where(self) -> str:
        """What messages call this store."""
        return str(self.folder)

    def _load(self, name: str) -> bytes:
        """Return the bytes of a file of the manifest, which are those that were written.

        Raises
        ------
        UserError
            If they are not, or cannot be read.
        """
        if name not in self.manifest.files:
            raise self.damaged(ValueError(f"{name} is not in its manifest"))
        try:
            return self._read_file(name)
        except (ValueError, OSError) as error:
            raise error if isinstance(error, UserError) else self.unread(error) from None

    def _read_file(self, name: str) -> bytes:
        return read_checked(self.folder, name, self.manifest.files[name])

    def _fetch(self, names: Iterable[str]) -> None:
        """Have files of the manifest on this machine that will be read, all at once where they come from afar.

        Raises
        ------
        UserError
            If they are not what was written, or cannot be read.
        """
        try:
            self._copy_here(names)
        except (ValueError, OSError) as error:
            raise error if isinstance(error, UserError) else self.unread(error) from None

    def _copy_here(self, names: Iterable[str]) -> None:
        """See :meth:`_fetch`; raises ValueError or OSError."""

    def _needed_to_open(self) -> Iterator[str]:
        """Yield the names of the files that opening reads, but those of arrays that the machine's processes share."""
        begins, ends = ("gaps/zarr", "counts/zarr", "rows/first_cell/"), ("/c/0", "/zarr.json")
        for name in self.manifest.files:
            if name == GENES or name.startswith(begins) or (name.startswith("rows/") and name.endswith(ends)):
                yield name

    def _files_of(self, array: str, numbers: Iterable[int]) -> Iterator[str]:
        """Yield the names of files of an array with an entry a cell; only those of zeros are not there."""
        for number in numbers:
            for name in (f"{array}/c/{number}", f"{array}/c/{number}/0"):
                if name in self.manifest.files:
                    yield name

    def _read_array(self, name: str, n: int | None = None, rows: tuple[int, int] | None = None) -> NDArray[Any]:
        start, stop = (0, self.manifest.n_cells if n is None else n) if rows is None else rows
        self._fetch(self._files_of(name, range(start // ROWS_CHUNK, -(-stop // ROWS_CHUNK))))
        try:
            return read_array(name, self.manifest.n_cells if n is None else n, self.manifest.files, self._load, rows)
        except (ValueError, OSError) as error:
            raise error if isinstance(error, UserError) else self.unread(error) from None

    @functools.cached_property
    def _host(self) -> HostArrays:
        try:
            return HostArrays(self._access.folder() / "arrays")
        except RuntimeError:  # how pathlib says that there is no home folder
            return HostArrays(None)

    def share(self, what: str, n: int, kind: np.dtype[Any], fill: Fill) -> NDArray[Any]:
        """Return an array ``[n]`` that ``fill`` writes, shared with the other processes if it is of many entries.

        ``what`` names it; it is a pure function of this and of the store.
        """
        if n <= ROWS_CHUNK:
            values = np.empty(n, kind)
            fill(values)
            return values
        return self._host.get(f"{self.fingerprint}/{what}", n, kind, fill)

    def _check_source(self, source: NDArray[Any]) -> NDArray[Any]:
        if source.dtype != np.int32 or not 0 <= source.min() <= source.max() < len(self.manifest.sources):
            raise self.damaged(ValueError("origin/source names inputs that the manifest does not know"))
        return source

    def _check_row(self, row: NDArray[Any]) -> NDArray[Any]:
        if row.dtype != np.int64 or row.ndim != 1:
            raise self.damaged(ValueError("origin/row is of another type than bgen writes"))
        return row

    def _per_cell(
        self, name: str, check: Callable[[NDArray[Any]], NDArray[Any]], rows: tuple[int, int] | None = None
    ) -> NDArray[Any]:
        """Return an array with one entry a cell, of which ``check`` has looked at every part and returned it.

        One of a single file is read; one of more files is shared with the other processes of this machine.
        """
        n = self.manifest.n_cells
        if rows is not None or n <= ROWS_CHUNK:
            return check(self._read_array(name, rows=rows))
        kind = check(self._read_array(name, rows=(0, 1))).dtype
        key = f"{name}/{kind.str}"

        def fill(values: NDArray[Any]) -> None:
            self._fetch(self._files_of(name, range(-(-n // ROWS_CHUNK))))
            for part in parts(n):
                values[part] = check(self._read_array(name, rows=(part.start, part.stop)))

        held = self._held.get(key)
        if held is None:
            held = self._held[key] = self._host.get(f"{self.fingerprint}/{name}", n, kind, fill)
        return held

    def _pick(self, name: str, check: Callable[[NDArray[Any]], NDArray[Any]], cells: I64) -> NDArray[Any]:
        """Return entries (or rows) of some cells, in their order, holding those of one file of others at a time."""
        files = cells // ROWS_CHUNK
        found: NDArray[Any] | None = None
        self._fetch(self._files_of(name, which := np.unique(files).tolist()))
        for number in which:
            start = number * ROWS_CHUNK
            part = check(self._read_array(name, rows=(start, min(start + ROWS_CHUNK, self.manifest.n_cells))))
            if found is None:
                found = np.empty((len(cells), *part.shape[1:]), part.dtype)
            there = files == number
            found[there] = part[cells[there] - start]
        return check(self._read_array(name, rows=(0, 1)))[:0] if found is None else found


def code_type(categories: int) -> np.dtype[np.signedinteger[Any]]:
    """Return the smallest signed type of codes from -1 to below ``categories``."""
    return np.dtype(next(kind for kind in (np.int8, np.int16, np.int32) if categories - 1 <= np.iinfo(kind).max))
