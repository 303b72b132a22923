"""How columns of a user's obs are read: names as text, times and doses with units, and what a model knows of them.

Axes: N cells.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from bgen.errors import UserError, nearest
from bgen.hub.directory import ColumnInfo
from bgen.store.format.columns import is_whole, whole_as_text
from data_tools.check.quantities import Quantities, read_quantities

MISSING = {"", "nan", "none", "na", "unknown", "unassigned", "unlabelled"}
"""Texts, in lower case, that say that a cell has no label."""


def role_column(obs: pd.DataFrame, name: str, info: ColumnInfo) -> str | None:
    """Return the obs column that holds a column of the model, found by name, else by role; None if there is none."""
    return next((column for column in (name, info.role) if column in obs), None)


def match_columns(
    obs: pd.DataFrame, columns: Mapping[str, ColumnInfo], units: Mapping[str, str]
) -> tuple[dict[str, NDArray[Any]], dict[str, str], dict[str, dict[str, int]], list[str]]:
    """Return what the data has of the columns that a model knows.

    Returns
    -------
    tuple
        Column to codes (int64, -1 = unknown) or numbers (float32, NaN = none) ``[N]``; column to the obs column that
        has it; column to the values that the model does not know and how many cells have each; how texts were read as
        times or doses, a sentence each.
    """
    found: dict[str, NDArray[Any]] = {}
    where: dict[str, str] = {}
    unknown: dict[str, dict[str, int]] = {}
    said: list[str] = []
    for name, info in columns.items():
        column = role_column(obs, name, info)
        if column is None:
            continue
        where[name] = column
        if info.kind == "category":
            texts = as_text(obs[column])
            found[name] = pd.Index(info.categories).get_indexer(pd.Index(texts)).astype(np.int64)
            strange = texts[(found[name] < 0) & ~texts.str.lower().isin(MISSING).to_numpy()]
            if len(strange):
                unknown[name] = {str(value): int(n) for value, n in strange.value_counts().items()}
            continue
        read = _read_numbers(obs[column], info.role, units.get(info.role))
        found[name] = read.numbers.astype(np.float32)
        if read.wrong:
            unknown[name] = read.wrong
        if read.read and read.unit:
            said.append(read.sentence(column))
    return found, where, unknown, said


def _read_numbers(values: pd.Series, role: str, unit: str | None) -> Quantities:
    """Read a column of numbers; texts are read as times or doses where the model's column is one."""
    if role in ("time", "dose"):
        return read_quantities(values, "time" if role == "time" else "dose", unit)
    numbers = pd.to_numeric(values.astype(object), errors="coerce").to_numpy(np.float64)
    strange = values[np.isnan(numbers) & values.notna().to_numpy()].astype(str).value_counts()
    return Quantities(numbers, None, wrong={str(text): int(n) for text, n in strange.items()})


def as_text(values: pd.Series) -> pd.Series:
    """Return names as text; whole numbers have no decimal point, and cells without a value have ""."""
    named = whole_as_text(values) if is_whole(values) else values.astype(object)
    return named.where(values.notna().to_numpy(), "").astype(str)


def text_column(adata: AnnData, name: str, keep: Collection[str] = ()) -> NDArray[np.str_]:
    """Return an obs column as text ``[N]``; cells without a value have "".

    Parameters
    ----------
    keep
        Labels that are values, though their text says that there is none: controls that are called "None" or "NA".

    Raises
    ------
    UserError
        If it is not there; names the nearest.
    """
    require_column(adata, name)
    return as_labels(adata.obs[name], keep)


def as_labels(values: pd.Series, keep: Collection[str] = ()) -> NDArray[np.str_]:
    """Return a column as text ``[N]``; see :func:`text_column`."""
    texts = as_text(values)
    return np.where(texts.str.lower().isin(MISSING) & ~texts.isin(list(keep)), "", texts).astype(str)


def require_column(adata: AnnData, name: str) -> None:
    """Raise UserError if obs has no such column; names the nearest."""
    if name not in adata.obs:
        raise UserError(
            f"obs has no column '{name}'.{nearest(name, adata.obs.columns)}"
            f" Its columns: {', '.join(map(str, adata.obs.columns)) or 'none'}."
        )
