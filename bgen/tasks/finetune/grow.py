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
from bgen.genes.table import SOURCE, TUNED, known_by_vector
from bgen.hub.directory import Module, SavedModel
from bgen.models.codec import Codec
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.grow import grow_codec, grow_flow
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
    sets = parent.module.conditions.set_names if isinstance(parent.module, LatentFlow) else []
    for name, info in parent.columns.items():
        if name in sets:  # what their labels mean is for the task that learns them
            continue
        if info.kind == "category" and name in cells.matched.columns:
            there = text_column(cells.adata, cells.matched.columns[name])
            new = sorted(set(there.tolist()) - set(info.categories) - {""})
            if new:
                columns[name] = replace(info, categories=[*info.categories, *new])
                say(f"New in {name}: {', '.join(new[:8])}{', ...' if len(new) > 8 else ''}.")
    sizes = {name: len(columns[name].categories) for name in columns}
    shares, table = None, parent.genes.reset_index(drop=True)
    if add_genes and unknown:
        genes = cells.data.genes
        is_new, total = genes.ids.isin(unknown), cells.data.totals()
        shares = torch.from_numpy(total[is_new] / max(total[~is_new].sum(), 1.0)).float()
        added = pd.DataFrame({"id": genes.ids[is_new], "symbol": genes.symbols[is_new], "cells": 0})
        table = pd.concat([table, added.assign(**{SOURCE: ""}) if SOURCE in table else added], ignore_index=True)
    codec = grow_codec(parent.codec, {name: sizes[name] for name in parent.codec.covariates}, shares)
    if isinstance(parent.module, LatentFlow):
        module: Module = grow_flow(parent.module, codec, {name: sizes[name] for name in parent.module.conditions.sizes})
    else:
        assert isinstance(codec, VAE), "other codecs come with a flow"
        module = codec
    return replace(parent, module=module, genes=table, columns=columns)


def tuned_genes(genes: pd.DataFrame, cells: UserCells) -> pd.DataFrame:
    """Return a gene table in which genes that were known by their vectors alone, and of which the data has counts, are
    fine-tuned. ``cells`` are matched to it.
    """
    seen = known_by_vector(genes) & (np.asarray(cells.counts.sum(0)).ravel() > 0)
    return genes.assign(**{SOURCE: genes[SOURCE].mask(seen, TUNED)}) if seen.any() else genes


def widen_library(codec: Codec, cells: MemoryCells) -> None:
    """Let generated cells have the sizes of the data's cells, too."""
    library = np.log(np.maximum(np.asarray(cells.counts.sum(1)).ravel(), 1.0))
    low, high = codec.log_library_range.tolist()
    codec.log_library_range.copy_(torch.tensor([min(low, library.min()), max(high, library.max())]))


def known_columns(saved: SavedModel, cells: UserCells) -> dict[str, NDArray[Any]]:
    """Return codes or numbers ``[N]`` of every column that the model knows; unknown where the data lacks it."""
    absent = {
        name: np.full(len(cells), -1) if info.kind == "category" else np.full(len(cells), np.nan, np.float32)
        for name, info in saved.columns.items()
    }
    return {name: cells.columns.get(name, values) for name, values in absent.items()}
