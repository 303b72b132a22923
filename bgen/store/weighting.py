"""A store's cells in weighted order: which sources it has, and how often each comes."""

from __future__ import annotations

import numpy as np

from bgen.errors import UserError
from bgen.order.cells import Members, Order
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
    cells = store.cells_of_split(split)
    if len(cells) == 0:
        raise UserError(f"The split '{split}' of {store.folder} holds no cells.")
    if by is None:
        sources = store.source_of(cells)[0]
    else:
        column, values = store.column(by)
        if column.kind != "category":
            raise UserError(f"Sources are categories, and '{by}' holds numbers.")
        sources = values[cells]
    codes = np.unique(sources, return_inverse=True)[1]
    name = f"{store.fingerprint}/{split}"
    members = Members.of(cells, store.first_cell)
    return WeightedOrder(members, batch, lanes, window, seed, name, sources=codes, temperature=temperature)
