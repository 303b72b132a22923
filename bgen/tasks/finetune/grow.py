"""What fine-tuning changes before it trains: a parent with rows for what the user's data has and it has not.

Axes: N cells, G genes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray

from bgen.data.cells_in_memory import MemoryCells
from bgen.errors import UserError
from bgen.genes.table import plain_ids
from bgen.hub.directory import ColumnInfo, Module, SavedModel
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.grow import grow_flow, grow_vae
from bgen.models.vae.vae import VAE
from bgen.tasks.user_cells import text_column


def grow(
    parent: SavedModel, adata: AnnData, *, add_genes: bool, floor: float, layer: str | None, say: Callable[[str], None]
) -> SavedModel:
    """Return the parent with rows for the data's new batches, conditions and (if asked) genes, and say what is new.

    Raises
    ------
    UserError
        If the data has less than the share ``floor`` of the model's genes.
    """
    genes, names = parent.genes["id"].tolist(), pd.Index(plain_ids(adata.var_names.tolist()))
    known = names.isin(genes)
    share = known.sum() / len(genes)
    say(f"{known.sum():,} of the model's {len(genes):,} genes are in the data ({share:.0%}).")
    if share < floor:
        raise UserError(
            f"The data has {known.sum():,} of the model's {len(genes):,} genes ({share:.0%}, at least"
            f" {floor:.0%} are needed; --floor lowers that). The model's ids look like {', '.join(genes[:3])};"
            f" those of the data like {', '.join(names[:3])}."
        )
    new_genes = names[~known] if add_genes else names[:0]
    if (~known).any():
        fate = "added to the model" if add_genes else "left out; --add-genes adds them"
        say(f"{(~known).sum():,} genes of the data are new to the model: {fate}.")
    columns = dict(parent.columns)
    for name, info in parent.columns.items():
        if info.kind == "category" and (column := _find(info, name, adata)) is not None:
            there = text_column(adata, column)
            new = sorted(set(there.tolist()) - set(info.categories) - {""})
            if new:
                columns[name] = replace(info, categories=[*info.categories, *new])
                say(f"New in {name}: {', '.join(new[:8])}{', ...' if len(new) > 8 else ''}.")
    sizes = {name: len(columns[name].categories) for name in columns}
    shares = None
    if len(new_genes):
        total = np.asarray((adata.X if layer is None else adata.layers[layer]).sum(0)).ravel()
        shares = torch.from_numpy(total[~known] / max(total[known].sum(), 1.0)).float()
    vae = grow_vae(parent.vae, {name: sizes[name] for name in parent.vae.covariates}, shares)
    module: Module = vae
    if isinstance(parent.module, LatentFlow):
        module = grow_flow(parent.module, vae, {name: sizes[name] for name in parent.module.conditions.sizes})
    symbols = adata.var["symbol"].astype(str).to_numpy()[~known] if "symbol" in adata.var else names[~known]
    added = pd.DataFrame({"id": new_genes, "symbol": np.asarray(symbols)[: len(new_genes)], "cells": 0})
    table = pd.concat([parent.genes[["id", "symbol", "cells"]], added], ignore_index=True)
    return replace(parent, module=module, genes=table, columns=columns)


def widen_library(vae: VAE, cells: MemoryCells) -> None:
    """Let generated cells have the sizes of the data's cells, too."""
    library = np.log(np.maximum(np.asarray(cells.counts.sum(1)).ravel(), 1.0))
    low, high = vae.log_library_range.tolist()
    vae.log_library_range.copy_(torch.tensor([min(low, library.min()), max(high, library.max())]))


def known_columns(saved: SavedModel, adata: AnnData) -> dict[str, NDArray[Any]]:
    """Return codes or numbers ``[n_cells]`` of every column that the model knows; unknown where the data lacks it."""
    columns: dict[str, NDArray[Any]] = {}
    for name, info in saved.columns.items():
        column = _find(info, name, adata)
        if info.kind == "category":
            there = text_column(adata, column) if column is not None else np.full(adata.n_obs, "")
            columns[name] = pd.Index(info.categories).get_indexer(pd.Index(there)).astype(np.int64)
        elif column is None:
            columns[name] = np.full(adata.n_obs, np.nan, np.float32)
        else:
            columns[name] = pd.to_numeric(adata.obs[column], errors="coerce").to_numpy(np.float32)
    return columns


def _find(info: ColumnInfo, name: str, adata: AnnData) -> str | None:
    return next((column for column in (name, info.role) if column in adata.obs), None)
