"""A store's cells in weighted order: which sources it has, and how often each comes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.errors import UserError
from bgen.order.cells import Members, Order, pick
from bgen.order.groups import parts
from bgen.order.weighted import WeightedOrder
from bgen.store.store import Store


def weighted_order(
    store: Store,
    split: str,
    *,
    batch: int,
    lanes: int,
    window: int,
    seed: int,
    temperature: float,
    by: str | None = None,
) -> Order:
    """Return the order of the cells of a split with sources drawn by weight.

    Parameters
    ----------
    batch, lanes, window, seed
        As of :meth:`bgen.store.store.Store.order`.
    temperature
        1: as they are; the higher, the more alike.
    by
        Column or role whose categories are the sources; None: the input files.

    Raises
    ------
    UserError
        If the column is not of categories, the split holds no cells or the temperature is below 1.
    """
    cells = store.split(split)
    if len(cells) == 0:
        raise UserError(f"The split '{split}' of {store.folder} holds no cells.")
    if by is None:
        every = len(store.manifest.sources)
        sources = pick(store.sources(), cells)
    else:
        column, values = store.column(by)
        if column.kind != "category":
            raise UserError(f"Sources are categories, and '{by}' holds numbers.")
        every = len(column.categories)
        sources = pick(values, cells)
    # cells without a category are a source of their own, the first one
    there = count_values(sources, every)
    number = np.append(np.cumsum(there[1:] > 0) - 1 + (there[0] > 0), 0)
    name = f"{store.fingerprint}/{split}"
    members = Members.of(cells, store.first_cell)
    about = members, batch, lanes, window, seed, name
    return WeightedOrder(*about, sources=sources, temperature=temperature, source_of=number)


def count_values(codes: NDArray[np.integer[Any]], n: int) -> I64:
    """Return int64 ``[1 + n]``: how many of some codes are -1, 0, 1, ... n - 1; a part of them is copied at a time."""
    found = np.zeros(1 + n, np.int64)
    for part in parts(len(codes)):
        found += np.bincount(codes[part].astype(np.int64) + 1, minlength=1 + n)
    return found
