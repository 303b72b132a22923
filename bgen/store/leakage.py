"""Check, before the first step, that the splits of a store keep apart what they were meant to keep apart."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.arrays import I64, U8
from bgen.errors import UserError
from bgen.order.groups import parts
from bgen.store.format.manifest import Column
from bgen.store.splits import group_names
from bgen.store.store import Store
from bgen.store.weighting import count_values


def assert_no_leakage(store: Store) -> None:
    """Check that every cell is in one split, once, and that no group is in two.

    Groups are the values of the column that the store was split by. The control of perturbations is meant to be in all
    splits. Where values were held out by name, only they are bound to a split.

    Raises
    ------
    UserError
        Naming what is in two splits.
    """
    manifest = store.manifest
    codes = store.rows("split")
    names = list(manifest.splits)
    counts = count_values(codes, len(names))[1:]
    if len(codes) != len(store) or counts.tolist() != list(manifest.splits.values()):
        raise UserError(f"The splits of {store.folder} are not those of its manifest. Build the store again.")
    _check_rows(store)
    if manifest.split_by is None:
        return
    labels, in_split = _groups(*store.column(manifest.split_by), codes, len(names))
    held = {value: split for split, chosen in manifest.held_out.items() for value in chosen}
    is_control = manifest.split_by == manifest.roles.get("perturbation")
    for label, there in zip(labels, in_split, strict=True):
        splits = [name for name, one in zip(names, there, strict=True) if one]
        if is_control and label == manifest.control:
            continue
        if manifest.held_out:
            if label in held and splits != [held[label]]:
                raise UserError(
                    f"{manifest.split_by} '{label}' was held out for {held[label]}, but is in {' and '.join(splits)}."
                    " Build the store again."
                )
        elif len(splits) > 1:
            raise UserError(
                f"{manifest.split_by} '{label}' is in the splits {' and '.join(splits)}, though {store.folder} was"
                " split by it. Build the store again."
            )


def _groups(
    column: Column, values: NDArray[Any], codes: NDArray[np.unsignedinteger[Any]], splits: int
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return the distinct values ``[K]`` of a column as texts, and bool ``[K, splits]``: in which splits they are.

    A part of the cells is looked at at a time.
    """
    distinct = np.zeros(0, values.dtype)
    for part in parts(len(values)):
        distinct = np.unique(np.concatenate([distinct, np.unique(values[part])]))
    there = np.zeros((len(distinct), splits), bool)
    for part in parts(len(values)):
        there[np.searchsorted(distinct, values[part]), codes[part]] = True
    if column.kind == "category":
        return np.array([*column.categories, "nan"], dtype=object)[distinct.astype(np.int64)], there
    return group_names(pd.Series(distinct)), there


def _check_rows(store: Store) -> None:
    """Check that no row of an input is in the store twice.

    A bit for each row of the inputs tells whether it was seen; where they have so many that 8 bytes for each cell of
    the store are less, the rows are sorted.

    Raises
    ------
    UserError
        If one is, or a row is not among those of its input.
    """
    every = [source.cells for source in store.manifest.sources]
    if min(every, default=0) < 0 or sum(every) >= 1 << 62:
        raise UserError(f"The inputs of {store.folder} have impossible numbers of cells. Build the store again.")
    rows = np.array(every, np.int64)
    first = np.cumsum(rows) - rows
    by_bit = sum(every) <= 64 * len(store)
    seen = np.zeros(sum(every) // 8 + 1 if by_bit else 0, np.uint8)
    line = np.zeros(0 if by_bit else len(store), np.int64)
    twice = 0
    for part in parts(len(store)):
        source, row = store.origin(part.start, part.stop)
        if row.min() < 0 or (row >= rows[source]).any():
            raise UserError(f"{store.folder} names rows that its inputs do not have. Build the store again.")
        if by_bit:
            twice += _mark(first[source] + row, seen)
        else:
            line[part] = first[source] + row
    line.sort()
    for part in parts(len(line)):
        some = line[part.start : part.stop + 1]
        twice += int((some[1:] == some[:-1]).sum())
    if twice:
        raise UserError(f"{twice:,} rows of the inputs are in {store.folder} twice. Build the store again.")


@numba.njit(cache=True, nogil=True)
def _mark(places: I64, seen: U8) -> int:
    """Set bits, and return how many had been set before."""
    twice = 0
    for place in places:
        bit = np.uint8(1 << (place & 7))
        twice += (seen[place >> 3] & bit) != 0
        seen[place >> 3] |= bit
    return twice
