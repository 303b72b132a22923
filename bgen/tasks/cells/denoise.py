"""``bgen denoise``: the counts that are expected of each cell, given its latent state.

Axes: N cells, G genes of the model, V genes of the data.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from bgen.errors import UserError
from bgen.evaluate.metrics.calibration import calibration
from bgen.evaluate.metrics.denoising import molecular_cross_validation, split_molecules
from bgen.genes.table import match_genes
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.user_cells import in_genes_of, require_cells

LAYER = "denoised"
SCORED_CELLS = 1000
"""Cells of the data that denoising is scored on."""


def denoise_cells(
    model: AnnDataModel, adata: AnnData, *, layer: str | None = None, library_size: float | None = None
) -> AnnData:
    """Return a copy of the data with expected counts.

    Parameters
    ----------
    layer
        Layer with the raw counts; default X.
    library_size
        Expected total counts of each cell over the model's genes; default: such that the genes that the data has add
        up to what was measured of them.

    Returns
    -------
    AnnData
        With ``layers['denoised']``: float32, NaN for genes that the model does not know; a summary in
        ``uns['bgen_denoise']``. Genes keep their mean over similar cells: differences within a cell state are gone, so
        do not test for differential expression on this layer.
    """
    require_cells(adata)
    if library_size is not None and not library_size > 0:
        raise UserError(f"The library size is a positive number of counts, not {library_size:g}.")
    counts = model.counts(adata, layer)
    z, _ = model.encode(adata, layer=layer)
    there = match_genes(model.genes, adata.var_names.astype(str).tolist(), what="the data")
    expected = _expected(model, adata, z, counts, np.flatnonzero(there >= 0), library_size)
    values = in_genes_of(adata, model.genes, expected)
    denoised = adata.copy()
    denoised.layers[LAYER] = values
    denoised.uns["bgen_denoise"] = {
        "model": model.saved.fingerprint(),
        "library_size": "as measured" if library_size is None else float(library_size),
        "genes_unknown_to_the_model": int(np.isnan(values[:1]).sum()),
    }
    return denoised


def denoising_scores(model: AnnDataModel, adata: AnnData, *, layer: str | None = None, seed: int = 0) -> dict[str, Any]:
    """Score denoising by molecular cross-validation on at most 1,000 cells, beside PCA and the mean over cells.

    Returns the deviances, and the share of held-out counts in the central 50 and 90 % of the model's distributions.
    """
    rows = np.sort(np.random.default_rng(seed).permutation(adata.n_obs)[:SCORED_CELLS])
    some = adata[rows]
    genes = pd.Index(model.genes)

    def by_model(half: sp.csr_matrix) -> NDArray[np.float64]:
        thinned = AnnData(half, obs=some.obs, var=pd.DataFrame(index=genes))
        z, _ = model.encode(thinned)
        return _expected(model, thinned, z, half, np.arange(len(genes)), None).astype(np.float64)

    counts = model.counts(some, layer)
    scores: dict[str, Any] = molecular_cross_validation(counts, {"model": by_model}, seed=seed)
    if model.saved.vae.config.likelihood == "nb":
        first, second = split_molecules(counts, seed)
        theta = np.exp(model.saved.vae.log_theta.detach().numpy().astype(np.float64))
        scores["calibration"] = calibration(second, by_model(first), theta, seed=seed).as_json()
    return scores


def _expected(
    model: AnnDataModel,
    adata: AnnData,
    z: NDArray[np.float32],
    counts: sp.csr_matrix,
    shared: NDArray[np.intp],
    library_size: float | None,
) -> NDArray[np.float32]:
    """Expected counts ``[N, G]`` of cells with latents ``z [N, D]``, of which the genes ``shared`` were measured."""
    mean = model.decode_codes(z, np.ones(len(z), np.float32), model.covariates(adata))
    if library_size is not None:
        total = np.full(len(z), library_size, np.float32)
    else:
        total = np.asarray(counts.sum(1)).ravel() / np.maximum(mean[:, shared].sum(1), 1e-12)
    expected: NDArray[np.float32] = mean * total[:, None].astype(np.float32)
    return expected
