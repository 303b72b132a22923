"""Reading a user's AnnData, and the parts of it that tasks ask for, with one message for each mistake."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from bgen.errors import UserError, nearest
from bgen.genes.table import plain_ids

MISSING = {"", "nan", "none", "na", "unknown", "unassigned", "unlabelled"}
"""Texts, in lower case, that say that a cell has no label."""


def read_h5ad(path: Path) -> AnnData:
    """Read an .h5ad that holds cells.

    Raises
    ------
    UserError
        If it is not there, cannot be read, or is empty.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        adata = anndata.read_h5ad(path)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read as .h5ad: {error}") from None
    require_cells(adata, path.name)
    return adata


def require_cells(adata: AnnData, what: str = "the data") -> None:
    """Raise UserError if there are no cells or no genes."""
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise UserError(f"{what} is empty: {adata.n_obs} cells x {adata.n_vars} genes. Check what was selected.")


def text_column(adata: AnnData, name: str) -> NDArray[np.str_]:
    """Return an obs column as text ``[n_cells]``; cells without a value have "".

    Raises
    ------
    UserError
        If it is not there; names the nearest.
    """
    if name not in adata.obs:
        raise UserError(
            f"obs has no column '{name}'.{nearest(name, adata.obs.columns)}"
            f" Its columns: {', '.join(map(str, adata.obs.columns)) or 'none'}."
        )
    column: pd.Series = adata.obs[name].astype(object)
    texts = column.where(column.notna(), "").astype(str).to_numpy(dtype=str)
    return np.where(pd.Series(texts).str.lower().isin(MISSING).to_numpy(), "", texts)


def in_genes_of(adata: AnnData, genes: Sequence[str], values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return values ``[n_cells, G]`` of the genes of a model as a layer of the data, NaN for genes not among them."""
    places = pd.Index(genes).get_indexer(pd.Index(plain_ids(adata.var_names.tolist())))
    layer = np.full(adata.shape, np.nan, np.float32)
    layer[:, places >= 0] = values[:, places[places >= 0]]
    return layer
