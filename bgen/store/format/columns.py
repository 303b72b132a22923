"""Columns of obs as a store keeps them: codes of categories, or numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.store.format.manifest import Column

MAX_CATEGORIES = 65_536
"""A column with more distinct texts names cells; it is no category that a model could learn."""


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
