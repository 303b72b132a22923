"""Colours of categories, as scanpy keeps them: ``uns['{column}_colors']``, in the order of the categories."""

from __future__ import annotations

import pandas as pd
from anndata import AnnData

GREY = "#d3d3d3"
"""Colour of what has none, as scanpy has it for what is missing."""


def colours_of(cells: AnnData, column: str) -> dict[str, str]:
    """Return the colour of each category of an obs column; none where the cells have no colours of it."""
    given, kept = cells.obs.get(column), cells.uns.get(f"{column}_colors")
    if kept is None or given is None or not isinstance(given.dtype, pd.CategoricalDtype):
        return {}
    return dict(zip(given.cat.categories.astype(str), map(str, kept), strict=False))
