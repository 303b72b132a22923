"""Arrays with one entry (or row) a cell: how a store keeps them, and columns of obs among them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import google_crc32c
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.cpus import cpus
from bgen.order.groups import parts
from bgen.store.format.manifest import Column
from bgen.store.format.shards import WHOLE, decode_zstd

MAX_CATEGORIES = 65_536
"""A column with more distinct texts names cells; it is no category that a model could learn."""

ROWS_CHUNK = 65_536
"""Entries of a chunk."""

MOST_WIDTH = 4096
"""Entries of a row, at most: bytes of a barcode."""

NAMED = ("cell_type", "batch", "donor", "perturbation")
"""Roles whose columns hold names, also where these are written as numbers."""

TYPES = ("uint8", "uint16", "uint32", "uint64", "int32", "int64", "float32", "float64")


def obs_path(column: str) -> str:
    """Return where a column of obs lies in the store; its name may hold any character."""
    quoted = quote(column, safe="")
    return f"obs/{quoted if quoted.strip('.') else quoted.replace('.', '%2E')}"


def column_metadata(values: NDArray[Any]) -> dict[str, Any]:
    """Return the zarr v3 metadata of an array with one entry (or row) a cell."""
    return {
        "shape": list(values.shape),
        "data_type": values.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [ROWS_CHUNK, *values.shape[1:]]}},
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}} if values.itemsize > 1 else {"name": "bytes"},
            {"name": "zstd", "configuration": {"level": 1, "checksum": False}},
            {"name": "crc32c"},
        ],
        "fill_value": 0,
    }


def read_array(
    name: str, n: int, files: Collection[str], load: Callable[[str], bytes], rows: tuple[int, int] | None = None
) -> NDArray[Any]:
    """Read an array that was written with :func:`column_metadata`.

    It is read here and not by a general reader, so that every byte is compared with the manifest, a file that is
    missing is never taken for zeros, and the memory is known before it is taken: what one file holds is at most
    :data:`ROWS_CHUNK` entries.

    Parameters
    ----------
    name
        The array's folder in the store.
    n
        How many entries or rows it must have.
    files
        The files of the manifest; only chunks of zeros are not among them.
    load
        Returns the bytes of one of them, as they were written.
    rows
        Read only the files that hold the entries from the first to below the second; None: all.

    Returns
    -------
    NDArray
        ``[n]`` or ``[n, width]``, or as many rows as were asked for.

    Raises
    ------
    ValueError
        If a file is missing or damaged, or the array is another one than it must be.
    OSError
        If a file cannot be read.
    """
    shape, dtype = _shape(name, n, load(f"{name}/zarr.json"))
    start, stop = (0, n) if rows is None else rows
    low, high = start // ROWS_CHUNK, -(-stop // ROWS_CHUNK)
    before = low * ROWS_CHUNK
    values = np.zeros((min(high * ROWS_CHUNK, n) - before, *shape[1:]), dtype)
    tail = "/0" if len(shape) == 2 else ""
    numbers = [number for number in range(low, high) if f"{name}/c/{number}{tail}" in files]

    def read(number: int) -> None:
        file = f"{name}/c/{number}{tail}"
        data = load(file)
        if google_crc32c.value(data) != WHOLE:
            raise ValueError(f"{file} does not have the bytes that were written")
        part = values[number * ROWS_CHUNK - before : (number + 1) * ROWS_CHUNK - before]
        chunk = part if len(part) == ROWS_CHUNK else np.empty((ROWS_CHUNK, *shape[1:]), dtype)
        try:
            decode_zstd(memoryview(data)[:-4], chunk.reshape(-1).view(np.uint8))
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error})") from None
        if chunk is not part:
            part[:] = chunk[: len(part)]

    if len(numbers) == 1:
        read(numbers[0])
    elif numbers:
        with ThreadPoolExecutor(cpus() + 4) as pool:
            list(pool.map(read, numbers))
    return values[start - before : stop - before]


def count_chunks(name: str, files: Collection[str]) -> int:
    """Return how many chunks of an array are among the files of a manifest."""
    return sum(file.startswith(f"{name}/c/") for file in files)


def _shape(name: str, n: int, text: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of an array from its ``zarr.json``, which must be one of ours.

    Raises
    ------
    ValueError
        If it is not.
    """
    try:
        about = json.loads(text)
        shape, dtype = tuple(about["shape"]), np.dtype(about["data_type"]).newbyteorder("<")
        ours = (
            about["data_type"] in TYPES
            and all(type(size) is int for size in shape)
            and shape[:1] == (n,)
            and (len(shape) == 1 or (len(shape) == 2 and 0 < shape[1] <= MOST_WIDTH))
            and about["chunk_grid"]["configuration"]["chunk_shape"] == [ROWS_CHUNK, *shape[1:]]
            and [codec["name"] for codec in about["codecs"]] == ["bytes", "zstd", "crc32c"]
            and about["codecs"][0].get("configuration", {}).get("endian", "little") == "little"
            and about["fill_value"] == 0
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        ours = False
    if not ours or math.prod(shape) >= 1 << 62:
        raise ValueError(f"{name}/zarr.json does not describe what the manifest says")
    return shape, dtype


def encode_column(values: pd.Series) -> tuple[Column, NDArray[Any]] | None:
    """Return what a column is and its values ``[n_cells]``, or None if it has too many distinct texts.

    Numbers become float32 where that holds them exactly, else float64; everything else int32 codes of the sorted
    texts, -1 = missing.
    """
    found = describe_column(values)
    return None if found is None else (found[0], found[1](slice(0, len(values))))


def describe_column(values: pd.Series) -> tuple[Column, Callable[[slice | NDArray[Any]], NDArray[Any]]] | None:
    """Return what a column is, and what returns the values of some cells, as :func:`encode_column` says."""
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):

        def numbers(rows: slice | NDArray[Any]) -> NDArray[np.float64]:
            return pd.Series(values.array[rows]).to_numpy(dtype=np.float64, na_value=np.nan)

        def rounded(rows: slice | NDArray[Any]) -> NDArray[np.float32]:
            return numbers(rows).astype(np.float32)

        with np.errstate(over="ignore"):
            exact = all(
                np.array_equal(rounded(part).astype(np.float64), numbers(part), equal_nan=True)
                for part in parts(len(values))
            )
        return Column(kind="number"), rounded if exact else numbers
    codes: NDArray[Any]
    if isinstance(values.dtype, pd.CategoricalDtype):  # the texts of its categories are few, those of its cells are not
        codes, named = values.array.codes, values.array.categories
        there = np.zeros(1 + len(named), bool)
        for part in parts(len(codes)):
            there[codes[part]] = True  # code -1 is the last entry
        number, categories = pd.factorize(named[there[:-1]].to_series().astype("string"), sort=True)
        table = np.full(len(there), -1, np.int32)
        table[:-1][there[:-1]] = number
    else:
        codes, categories = pd.factorize(values.astype("string"), sort=True)
        table = np.append(np.arange(len(categories), dtype=np.int32), np.int32(-1))
    if len(categories) > MAX_CATEGORIES:
        return None
    column = Column(kind="category", categories=[str(category) for category in categories])
    return column, lambda rows: table[codes[rows]]


def is_whole(values: pd.Series) -> bool:
    """Whether a column holds whole numbers (and cells without a value), and no other values."""
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        return False
    some = False
    for part in parts(len(values)):
        numbers = values.iloc[part].to_numpy(np.float64, na_value=np.nan)
        numbers = numbers[~np.isnan(numbers)]
        some = some or len(numbers) > 0
        if not (np.isfinite(numbers) & (numbers == np.rint(numbers))).all():
            return False
    return some


def whole_as_text(values: pd.Series) -> pd.Series:
    """Return whole numbers as text, without a decimal point: 3.0 is "3"; a cell without a value has none."""
    codes, numbers = pd.factorize(values.to_numpy(np.float64, na_value=np.nan))
    texts = np.array([*(str(int(number)) for number in numbers), None], dtype=object)
    return pd.Series(texts[codes], index=values.index, dtype=object)  # code -1: no value
