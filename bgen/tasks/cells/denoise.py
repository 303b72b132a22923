"""``bgen denoise``: the expected counts of each cell, given its latent state.

Axes: N cells, G genes of the model, V genes of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.errors import MOST_COUNTS, UserError, nearest, require_number
from bgen.evaluate.metrics.calibration import calibration
from bgen.evaluate.metrics.denoising import molecular_cross_validation, split_molecules
from bgen.evaluate.protocols.verdicts import judge_cells
from bgen.genes.table import find_genes
from bgen.tasks.anndata_model import BATCH, AnnDataModel
from bgen.tasks.batches import Batches
from bgen.tasks.user_cells import UserCells

LAYER = "denoised"
SCORED_CELLS = 1000
"""Cells of the data that denoising is scored on."""


def denoise_cells(
    model: AnnDataModel,
    cells: UserCells,
    *,
    library_size: float | None = None,
    genes: Sequence[str] | None = None,
) -> AnnData:
    """Return a copy of the data with expected counts.

    Parameters
    ----------
    library_size
        Expected total counts of each cell over the model's genes; default: the genes that the data have add up to their
        measured total.
    genes
        Ids or symbols: only these genes of the data are in the result; default: all.

    Returns
    -------
    AnnData
        With ``layers['denoised']``: float32, NaN for genes that the model does not know; a summary in
        ``uns['bgen_denoise']``. Genes keep their mean over similar cells: differences within a cell state are gone, so
        do not test for differential expression on this layer.

    Raises
    ------
    UserError
        If a gene is not one of the model's, or not in the data.
    """
    require_number("library_size", library_size, 1, MOST_COUNTS)
    columns = choose_columns(model, cells, genes)
    there = cells.of_var[columns] >= 0
    z, _ = model.encode(cells)
    values = np.full((len(cells), len(columns)), np.nan, np.float32)

    def fill(start: int, stop: int) -> None:
        rows = cells[np.arange(start, stop)]
        expected = _expected(model, rows, z[start:stop], np.flatnonzero(cells.known), library_size)
        values[start:stop, there] = expected[:, cells.of_var[columns[there]]]

    for _ in Batches(model.device, BATCH, dense=8 * len(model.genes)).over(len(cells), fill):
        pass
    denoised = cells.copy()
    model.mark_added_genes(denoised, cells)
    if genes is not None:
        denoised = denoised[:, columns].copy()
    denoised.layers[LAYER] = values
    denoised.uns["bgen_denoise"] = {
        "model": model.saved.fingerprint(),
        "library_size": "as measured" if library_size is None else float(library_size),
        "genes_unknown_to_the_model": int((~there).sum()),
    }
    return denoised


def choose_columns(model: AnnDataModel, cells: UserCells, genes: Sequence[str] | None) -> I64:
    """Return the columns of the data that a result has: all, or those of the genes that a user names.

    Raises
    ------
    UserError
        As :func:`find_wanted`.
    """
    if genes is None:
        return np.arange(len(cells.of_var))
    return np.flatnonzero(np.isin(cells.of_var, find_wanted(model, cells.known, genes)))


def find_wanted(model: AnnDataModel, known: NDArray[np.bool_], names: Sequence[str]) -> I64:
    """Return the distinct places of genes that a user names, by id or symbol, ascending.

    Parameters
    ----------
    known
        Which of the model's genes the data has ``[G]``.

    Raises
    ------
    UserError
        If the model or the data does not have one, or none is named.
    """
    if len(names) == 0:
        raise UserError("No gene is named.")
    table = model.saved.genes
    places = find_genes(table, list(names))
    if (places < 0).any():
        first = names[int(np.argmax(places < 0))]
        raise UserError(f"The model knows no gene '{first}'.{nearest(first, [*table['symbol'], *table['id']])}")
    if not known[places].all():
        first = names[int(np.argmin(known[places]))]
        raise UserError(f"The data does not have the gene '{first}', which the model knows.")
    return np.unique(places)


def denoising_scores(model: AnnDataModel, cells: UserCells, *, seed: int = 0) -> dict[str, Any]:
    """Score denoising by molecular cross-validation on at most 1,000 cells, beside PCA and the mean over cells.

    Returns the mean deviances, the strongest of the others and the verdict on the difference to it, and the share of
    held-out counts in the central 50 and 90 % of the model's distributions.
    """
    rows = np.sort(np.random.default_rng(seed).permutation(len(cells))[:SCORED_CELLS])
    some = cells[rows]
    every = np.arange(len(model.genes))

    def by_model(half: sp.csr_matrix) -> NDArray[np.float64]:
        thinned = replace(some, counts=half)
        z, _ = model.encode(thinned)
        return _expected(model, thinned, z, every, None).astype(np.float64)

    deviance = molecular_cross_validation(some.counts, {"model": by_model}, seed=seed)
    scores: dict[str, Any] = {name: float(values.mean()) for name, values in deviance.items()}
    scores["baseline"] = min((name for name in deviance if name != "model"), key=scores.__getitem__)
    if len(some) > 1:
        scores["verdict"] = judge_cells(deviance["model"], deviance[scores["baseline"]])
    if model.saved.vae.config.likelihood == "nb":
        first, second = split_molecules(some.counts, seed)
        theta = np.exp(model.saved.vae.log_theta.detach().cpu().numpy().astype(np.float64))
        scores["calibration"] = calibration(second, by_model(first), theta, seed=seed).as_json()
    return scores


def _expected(
    model: AnnDataModel,
    cells: UserCells,
    z: NDArray[np.float32],
    shared: NDArray[np.intp],
    library_size: float | None,
) -> NDArray[np.float32]:
    """Expected counts ``[N, G]`` of cells with latents ``z [N, D]``, of which the genes ``shared`` were measured."""
    mean = model.decode_codes(z, np.ones(len(z), np.float32), model.covariates(cells))
    return at_size(mean, cells.counts, shared, library_size)


def at_size(
    mean: NDArray[np.float32], counts: sp.csr_matrix, shared: NDArray[np.intp], library_size: float | None
) -> NDArray[np.float32]:
    """Return expected shares of counts ``[N, G]`` at the size of each cell, or at the one that is given.

    Parameters
    ----------
    counts
        Of the cells ``[N, G]``.
    shared
        Genes that were measured.
    """
    if library_size is not None:
        total = np.full(len(mean), library_size, np.float32)
    else:
        total = np.asarray(counts.sum(1)).ravel() / np.maximum(mean[:, shared].sum(1), 1e-12)
    expected: NDArray[np.float32] = mean * total[:, None].astype(np.float32)
    return expected
