"""Columns of obs as a store keeps them: codes of categories, or numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.store.format.manifest import Column

MAX_CATEGORIES = 65_536
"""A column with more distinct texts names cells; it is no category that a model could learn."""

NAMED = ("cell_type", "batch", "donor", "perturbation")
"""Roles whose columns hold names, also where these are written as numbers."""


def encode_column(values: pd.Series) -> tuple[Column, NDArray[Any]] | None:
    """Return what a column is and its values ``[n_cells]``, or None if it has too many distinct texts.

    Numbers become float32 where that holds them exactly, else float64; everything else int32 codes of the sorted
    texts, -1 = missing.
    """
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
        exact = np.array_equal(numbers.astype(np.float32).astype(np.float64), numbers, equal_nan=True)
        return Column(kind="number"), numbers.astype(np.float32) if exact else numbers
    codes, categories = pd.factorize(values.astype("string"), sort=True)
    if len(categories) > MAX_CATEGORIES:
        return None
    return Column(kind="category", categories=[str(category) for category in categories]), codes.astype(np.int32)


def is_whole(values: pd.Series) -> bool:
    """Whether a column holds whole numbers (and cells without a value), and no other values."""
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        return False
    numbers = values.to_numpy(np.float64, na_value=np.nan)
    numbers = numbers[~np.isnan(numbers)]
    return bool(len(numbers)) and bool((np.isfinite(numbers) & (numbers == np.rint(numbers))).all())


def whole_as_text(values: pd.Series) -> pd.Series:
    """Return whole numbers as text, without a decimal point: 3.0 is "3"; a cell without a value has none."""
    codes, numbers = pd.factorize(values.to_numpy(np.float64, na_value=np.nan))
    texts = np.array([*(str(int(number)) for number in numbers), None], dtype=object)
    return pd.Series(texts[codes], index=values.index, dtype=object)  # code -1: no value
