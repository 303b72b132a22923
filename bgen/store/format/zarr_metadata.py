"""Zarr arrays that others wrote, version 2 or 3: what their metadata may say, and whether all chunks are there.

A reader of zarr takes a missing chunk for zeros. In a sparse matrix that would silently give wrong counts, so missing
chunks are looked for. It also decodes with whatever codec an array names, some of which run code, and takes as much
memory as a few bytes of metadata ask for, so both are looked at before it sees the array.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bgen.errors import UserError

CODECS = frozenset(
    {
        *("bytes", "transpose", "sharding_indexed", "vlen-utf8", "vlen-bytes", "crc32c", "crc32", "adler32"),
        *("blosc", "zstd", "zlib", "gzip", "bz2", "lzma", "lz4", "fletcher32", "jenkins_lookup3"),
        *("shuffle", "delta", "bitround", "quantize", "fixedscaleoffset", "packbits", "astype"),
    }
)
"""Codecs that turn bytes into numbers or texts, and do nothing else; others, such as pickle, may run code."""

MOST_CHUNK_BYTES = 512 << 20
"""Bytes that are decoded at once, at most."""

MOST_ANNOTATION = 512 << 20
"""Bytes that annotation, which is read whole, takes at most, unless the file has :data:`MOST_RATIO` as many."""

MOST_RATIO = 200
"""How many times smaller than in memory annotation may be in a file that takes more than :data:`MOST_ANNOTATION`."""

MOST_METADATA = 64 << 20
"""Bytes of a file of metadata, at most."""

TEXT_BYTES = 64
"""Bytes of a text of any length in memory, about."""

WHOLE = ("obs", "var", "raw/var")
"""Parts of AnnData that are read whole; and of a sparse matrix ``indptr``."""


def require_modest(where: Path | str, wanted: int, stored: int) -> None:
    """Check that annotation does not take far more memory than its file explains.

    Parameters
    ----------
    wanted, stored
        Bytes in memory and in the file.

    Raises
    ------
    UserError
        If it does.
    """
    if wanted > max(MOST_ANNOTATION, MOST_RATIO * stored):
        raise UserError(
            f"{where}: its annotation would take {wanted / 1e9:,.1f} GB in memory, though the file has only"
            f" {stored / 1e6:,.1f} MB of it. Is it damaged? If it is right, write it without compression."
        )


def require_chunk(where: str, n_bytes: int) -> None:
    """Check that what is decoded at once is not more than :data:`MOST_CHUNK_BYTES`.

    Raises
    ------
    UserError
        If it is.
    """
    if n_bytes > MOST_CHUNK_BYTES:
        raise UserError(
            f"{where}: a chunk of it holds {n_bytes / 1e9:,.1f} GB, and bgen decodes at most"
            f" {MOST_CHUNK_BYTES >> 20} MiB at once. Write it again with smaller chunks."
        )


@dataclass(frozen=True)
class _Array:
    """What the metadata of an array say: its shape, its bytes per entry, and the entries that are decoded at once."""

    shape: tuple[int, ...]
    itemsize: int
    chunk: tuple[int, ...]


def require_safe(group: Path, read_whole: tuple[str, ...] = WHOLE) -> None:
    """Check a zarr group before anything reads it: codecs, sizes, links.

    Parameters
    ----------
    group
        An AnnData group, or a group of them.
    read_whole
        Its parts that are read whole; "" is everything.

    Raises
    ------
    UserError
        If a file is a link that leads out of the group, an array names a codec beyond :data:`CODECS`, metadata are
        damaged, a chunk is too large, or annotation takes far more memory than its files explain.
    """
    root = group.resolve()
    wanted: dict[str, int] = {}  # consolidated metadata may promise more than an array's own: the most counts
    stored = 0
    for folder, files in _folders(root):
        size = 0
        for entry in files:
            size += entry.stat(follow_symlinks=False).st_size
            if entry.name in ("zarr.json", ".zarray", ".zmetadata"):
                name = folder.relative_to(root).as_posix()
                for path, array in _arrays(Path(entry.path), name):
                    require_chunk(f"{group}: {path}", math.prod(array.chunk) * array.itemsize)
                    if _is_whole(path, read_whole):
                        wanted[path] = max(wanted.get(path, 0), math.prod(array.shape) * array.itemsize)
        if _is_whole(folder.relative_to(root).as_posix(), read_whole):
            stored += size
    require_modest(group, sum(wanted.values()), stored)


def _is_whole(path: str, read_whole: tuple[str, ...]) -> bool:
    """Whether an array, or a folder of its chunks, is read whole."""
    parts = path.split("/")
    return "indptr" in parts or any(not part or path.startswith(f"{part}/") for part in read_whole)


def _folders(root: Path) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """Yield every folder of a tree with its files."""
    waiting = [root]
    while waiting:
        folder, files = waiting.pop(), []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
                    raise UserError(f"{entry.path} is a link that leads out of {root}. Copy the file to its place.")
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                elif entry.is_file():
                    files.append(entry)
        yield folder, files


def _arrays(path: Path, name: str) -> Iterator[tuple[str, _Array]]:
    """Yield the arrays that a file of metadata describes, with their paths in the group."""
    try:
        if path.stat().st_size > MOST_METADATA:
            raise ValueError(f"it has more than {MOST_METADATA >> 20} MiB")
        tree = json.loads(path.read_text(encoding="utf-8"))
        yield from _described(tree, name)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({error}).") from None


def _described(tree: dict[str, Any], name: str) -> Iterator[tuple[str, _Array]]:
    if tree.get("node_type") == "array" or "compressor" in tree:
        yield name, _describe(tree, name)
    held = tree.get("metadata") or (tree.get("consolidated_metadata") or {}).get("metadata") or {}
    for key, item in held.items():
        yield from _described(item, f"{name}/{key}".removeprefix("./").removesuffix("/.zarray"))


def _describe(tree: dict[str, Any], name: str) -> _Array:
    shape, itemsize = _sizes(tree["shape"]), _itemsize(tree)
    if tree["zarr_format"] == 2:
        chunk = _sizes(tree["chunks"])
        codecs = [*(tree.get("filters") or ()), *([tree["compressor"]] if tree["compressor"] else [])]
        names = [codec["id"] for codec in codecs]
        objects = tree["dtype"] == "|O"
        if objects and names[:1] not in (["vlen-utf8"], ["vlen-bytes"]):
            raise ValueError("objects are no texts")
    else:
        chunk = _sizes(tree["chunk_grid"]["configuration"]["chunk_shape"])
        names, chunk = _codecs(tree["codecs"], chunk)
    if any(size == 0 for size in chunk) or len(chunk) != len(shape):
        raise ValueError("its chunks have no sizes")
    for codec in names:
        if codec.removeprefix("numcodecs.") not in CODECS:
            raise UserError(
                f"{name} is encoded with '{codec}', which bgen does not read: it may run code. Write it again with"
                " zstd, blosc or gzip."
            )
    return _Array(shape, itemsize, chunk)


def _codecs(codecs: Iterable[dict[str, Any] | str], chunk: tuple[int, ...]) -> tuple[list[str], tuple[int, ...]]:
    """Return the names of codecs, those within shards too, and the shape of what they decode at once."""
    names: list[str] = []
    for codec in codecs:
        name = codec if isinstance(codec, str) else codec["name"]
        names.append(name)
        if name == "sharding_indexed" and not isinstance(codec, str):
            about = codec["configuration"]
            inner = _sizes(about["chunk_shape"])
            if len(inner) != len(chunk) or any(size == 0 for size in inner):
                raise ValueError("its chunks have no sizes")
            if math.prod(-(-a // b) for a, b in zip(chunk, inner, strict=True)) > 1 << 24:
                raise ValueError("a shard has more than 2^24 chunks")
            below, chunk = _codecs(about["codecs"], inner)
            names += below + _codecs(about.get("index_codecs", ()), inner)[0]
    return names, chunk


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 1 << 62 for v in values):
        raise ValueError("its sizes are no sizes")
    return tuple(values)


def _itemsize(tree: dict[str, Any]) -> int:
    """Return the bytes of an entry in memory."""
    kind = tree["dtype"] if tree["zarr_format"] == 2 else tree["data_type"]
    if kind == "|O":
        return TEXT_BYTES
    if tree["zarr_format"] == 2:
        return np.dtype([tuple(field) for field in kind] if isinstance(kind, list) else kind).itemsize
    if isinstance(kind, dict):
        return max(int(kind.get("configuration", {}).get("length_bytes", TEXT_BYTES)), 1)
    bits = re.fullmatch(r"[a-z_]+?(\d+)", kind)
    return max(int(bits[1]) // 8, 1) if bits else 1 if kind == "bool" else TEXT_BYTES


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a zarr array.

    Raises
    ------
    UserError
        If there is none, or it is damaged.
    """
    for name in ("zarr.json", ".zarray"):
        if (path / name).is_file():
            try:
                return json.loads((path / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{path / name} is damaged ({error}).") from None
    raise UserError(f"{path}: there is no zarr array.")


def chunk_length(metadata: dict[str, Any]) -> int:
    """Return how many entries are decoded at once: those of a chunk, or of one within a shard."""
    if metadata["zarr_format"] == 2:
        return int(metadata["chunks"][0])
    for codec in metadata["codecs"]:
        if codec["name"] == "sharding_indexed":
            return int(codec["configuration"]["chunk_shape"][0])
    return _file_length(metadata)


def missing_files(path: Path) -> list[str]:
    """Return the chunk (or shard) files of an array that are not there: the first thousand, if they are more."""
    metadata = read_metadata(path)
    if len(metadata["shape"]) != 1:
        return []
    before = ""
    if metadata["zarr_format"] == 3 and metadata["chunk_key_encoding"]["name"] == "default":
        before = "c" + metadata["chunk_key_encoding"].get("configuration", {}).get("separator", "/")
    missing: list[str] = []
    for number in range(-(-metadata["shape"][0] // _file_length(metadata))):
        if not (path / f"{before}{number}").is_file():
            missing.append(f"{before}{number}")
            if len(missing) == 1000:
                break
    return missing


def _file_length(metadata: dict[str, Any]) -> int:
    if metadata["zarr_format"] == 2:
        return int(metadata["chunks"][0])
    return int(metadata["chunk_grid"]["configuration"]["chunk_shape"][0])


def require_whole(group: Path) -> None:
    """Check that no part of a stored sparse matrix is missing.

    Raises
    ------
    UserError
        Naming the first file that is not there.
    """
    for name in ("indptr", "indices", "data"):
        if missing := missing_files(group / name):
            count = f"{len(missing)}{' or more' if len(missing) == 1000 else ''}"
            raise UserError(
                f"{group}: {count} file(s) of '{name}' are missing, the first is {missing[0]}. Copy it again."
            )
