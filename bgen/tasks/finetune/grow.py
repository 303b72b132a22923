"""What fine-tuning does before it trains: give the parent rows for new batches, conditions and genes of the user's
data.

Axes: N cells, G genes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from bgen.data.cells_in_memory import MemoryCells
from bgen.hub.directory import Module, SavedModel
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.grow import grow_flow, grow_vae
from bgen.models.vae.vae import VAE
from bgen.tasks.columns import text_column
from bgen.tasks.user_cells import UserCells


def grow(parent: SavedModel, cells: UserCells, *, add_genes: bool, say: Callable[[str], None]) -> SavedModel:
    """Return the parent with rows for the data's new batches, conditions and (if asked) genes, and say what is new.

    ``cells`` are matched to the parent.
    """
    unknown = cells.matched.unknown
    if unknown:
        fate = "added to the model" if add_genes else "left out; --add-genes adds them"
        say(f"{len(unknown):,} genes of the data are new to the model: {fate}.")
    columns = dict(parent.columns)
    for name, info in parent.columns.items():
        if info.kind == "category" and name in cells.matched.columns:
            there = text_column(cells.adata, cells.matched.columns[name])
            new = sorted(set(there.tolist()) - set(info.categories) - {""})
            if new:
                columns[name] = replace(info, categories=[*info.categories, *new])
                say(f"New in {name}: {', '.join(new[:8])}{', ...' if len(new) > 8 else ''}.")
    sizes = {name: len(columns[name].categories) for name in columns}
    shares, table = None, parent.genes[["id", "symbol", "cells"]].reset_index(drop=True)
    if add_genes and unknown:
        genes = cells.data.genes
        is_new, total = genes.ids.isin(unknown), cells.data.totals()
        shares = torch.from_numpy(total[is_new] / max(total[~is_new].sum(), 1.0)).float()
        added = pd.DataFrame({"id": genes.ids[is_new], "symbol": genes.symbols[is_new], "cells": 0})
        table = pd.concat([table, added], ignore_index=True)
    vae = grow_vae(parent.vae, {name: sizes[name] for name in parent.vae.covariates}, shares)
    module: Module = vae
    if isinstance(parent.module, LatentFlow):
        module = grow_flow(parent.module, vae, {name: sizes[name] for name in parent.module.conditions.sizes})
    return replace(parent, module=module, genes=table, columns=columns)


def widen_library(vae: VAE, cells: MemoryCells) -> None:
    """Let generated cells have the sizes of the data's cells, too."""
    library = np.log(np.maximum(np.asarray(cells.counts.sum(1)).ravel(), 1.0))
    low, high = vae.log_library_range.tolist()
    vae.log_library_range.copy_(torch.tensor([min(low, library.min()), max(high, library.max())]))


def known_columns(saved: SavedModel, cells: UserCells) -> dict[str, NDArray[Any]]:
    """Return codes or numbers ``[N]`` of every column that the model knows; unknown where the data lacks it."""
    absent = {
        name: np.full(len(cells), -1) if info.kind == "category" else np.full(len(cells), np.nan, np.float32)
        for name, info in saved.columns.items()
    }
    return {name: cells.columns.get(name, values) for name, values in absent.items()}
