"""``bgen integrate``: cells of all batches in one latent space, and their counts as one batch would have measured them.

The encoder of a VAE with a batch covariate is told the batch, and the decoder adds it again, so the latent state need
not hold it. Counts without batch effects come from the decoder, which is told the same reference batch for all cells.

Axes: N cells, D latent size, G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from anndata import AnnData

from bgen.errors import UserError, nearest
from bgen.evaluate.metrics.integration import UNINTEGRATED, require_scib, scib_figures
from bgen.evaluate.metrics.integrators import other_integrations
from bgen.evaluate.metrics.mixing import batch_mixing
from bgen.evaluate.metrics.space import fit_space
from bgen.tasks.anndata_model import BATCH, AnnDataModel
from bgen.tasks.cells.denoise import choose_columns
from bgen.tasks.cells.neighbours import add_neighbours
from bgen.tasks.columns import text_column
from bgen.tasks.user_cells import UserCells

EMBEDDING = "X_bgen_integrated"
LAYER = "integrated"


def integrate_cells(
    model: AnnDataModel,
    cells: UserCells,
    *,
    reference: str | None = None,
    batch: str | None = None,
    label: str | None = None,
    neighbours: int | None = None,
    genes: Sequence[str] | None = None,
) -> AnnData:
    """Return a copy of the data without batch effects.

    Parameters
    ----------
    reference
        Batch as which counts are decoded; default: the one with most cells in the data.
    batch
        Covariate of the model that is removed (column or role); default: its role "batch", or its only covariate.
    label
        obs column of cell types, to score by scib-metrics what is lost of them; default: not scored.
    neighbours
        Also the graph of so many nearest neighbours in the latent space, under scanpy's own keys
        (:func:`bgen.tasks.cells.neighbours.add_neighbours`).
    genes
        Ids or symbols: only these genes of the data are in the result; default: all.

    Returns
    -------
    AnnData
        With ``obsm['X_bgen_integrated'] [N, D]``, expected counts at the cell's own size in ``layers['integrated']``
        (NaN for genes that the model does not know), and in ``uns['bgen_integrate']`` how well batches mix
        (:func:`bgen.evaluate.metrics.mixing.batch_mixing`), beside uncorrected principal components; with ``label``
        the figures of scib-metrics of both (:func:`bgen.evaluate.metrics.integration.scib_figures`) under ``scib``, and
        those of Harmony and scVI where they are installed (:mod:`bgen.evaluate.metrics.integrators`).

    Raises
    ------
    UserError
        If the model has no such covariate, the data does not have a column, none of its batches is known,
        scib-metrics is asked for and not installed, there are fewer cells than neighbours, or a gene is not one of the
        model's, or not in the data.
    """
    adata = cells.adata
    types = None if label is None else text_column(adata, label)
    if types is not None:
        require_scib()
    name = _covariate(model, batch)
    info = model.saved.columns[name]
    column = cells.matched.columns.get(name, name)
    values = text_column(adata, column)
    codes = model.covariates(cells)
    known = codes[name] >= 0
    if not known.any():
        raise UserError(
            f"The model knows none of the batches in obs['{column}'] ({_some(values)}); it knows"
            f" {_some(info.categories)}. Adapt it to them first: `bgen finetune MODEL data.h5ad --task generate`."
        )
    if reference is None:
        names, numbers = np.unique(values[known], return_counts=True)
        reference = str(names[numbers.argmax()])
    if reference not in info.categories:
        raise UserError(f"The model knows no batch '{reference}'.{nearest(reference, info.categories)}")
    columns = choose_columns(model, cells, genes)
    z, _ = model.encode(cells)
    counts = cells.counts
    codes[name] = np.full(adata.n_obs, info.categories.index(reference))
    layer = np.full((len(cells), len(columns)), np.nan, np.float32)
    there, sizes = cells.of_var[columns] >= 0, np.asarray(counts.sum(1), np.float32).ravel()
    for first in range(0, len(cells), BATCH):
        part = slice(first, first + BATCH)
        expected = model.decode_codes(z[part], sizes[part], {name: of[part] for name, of in codes.items()})
        layer[part, there] = expected[:, cells.of_var[columns[there]]]
    integrated = cells.copy()
    integrated.obsm[EMBEDDING] = z
    if neighbours is not None:
        add_neighbours(integrated, EMBEDDING, neighbours)
    model.mark_added_genes(integrated, cells)
    if genes is not None:
        integrated = integrated[:, columns].copy()
    integrated.layers[LAYER] = layer
    summary: dict[str, Any] = {
        "model": model.saved.fingerprint(),
        "batch": name,
        "reference": reference,
        "cells_of_unknown_batches": int((~known).sum()),
    }
    if len(np.unique(values)) > 1:
        components = fit_space(counts).project(counts)
        summary["mixing"] = batch_mixing(z, values)
        summary["mixing_pca"] = batch_mixing(components, values)
        if types is not None:
            others = other_integrations(counts, components, values)
            summary["scib"] = scib_figures({"model": z, UNINTEGRATED: components, **others}, values, types)
    integrated.uns["bgen_integrate"] = summary
    return integrated


def _covariate(model: AnnDataModel, asked: str | None) -> str:
    """Return the model's covariate that is meant."""
    names = list(model.saved.vae.covariates)
    if not names:
        raise UserError(
            "The model has no batch covariate, so its latent state holds the batch effects. Train its VAE with"
            " vae.covariates=[batch]."
        )
    roles = {model.saved.columns[name].role: name for name in names}
    wanted = asked if asked is not None else "batch" if "batch" in roles or len(names) > 1 else names[0]
    if wanted not in names and wanted not in roles:
        raise UserError(f"The model has no covariate '{wanted}'.{nearest(wanted, [*names, *roles])}")
    return wanted if wanted in names else roles[wanted]


def _some(names: Any) -> str:
    distinct = list(dict.fromkeys(str(name) for name in names))
    return ", ".join(distinct[:4]) + (", ..." if len(distinct) > 4 else "")
