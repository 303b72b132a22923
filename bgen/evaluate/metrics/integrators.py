"""Integrations by other tools, to stand beside the model's: Harmony and the latent state of scVI, where installed.

Harmony (Korsunsky et al., Nature Methods 2019; package harmonypy) moves principal components. scVI (Lopez et al.,
Nature Methods 2018; package scvi-tools) is trained on the counts with its own defaults. Neither comes with bgen.

Axes: N cells, G genes, D components.
"""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

HARMONY, SCVI = "Harmony", "scVI"


def other_integrations(
    counts: sp.csr_matrix, components: NDArray[np.float32], batch: NDArray[np.str_], seed: int = 0
) -> dict[str, NDArray[np.float32]]:
    """Return an embedding ``[N, D]`` by each of the tools that is installed.

    Parameters
    ----------
    counts
        ``[N, G]``: what scVI is trained on.
    components
        ``[N, D]``: what Harmony moves.
    batch
        ``[N]``: what is removed.
    """
    found = {}
    if importlib.util.find_spec("harmonypy") is not None:
        found[HARMONY] = _harmony(components, batch, seed)
    if importlib.util.find_spec("scvi") is not None:
        found[SCVI] = _scvi(counts, batch, seed)
    return found


def _harmony(components: NDArray[np.float32], batch: NDArray[np.str_], seed: int) -> NDArray[np.float32]:
    import harmonypy

    table = pd.DataFrame({"batch": batch})
    moved = harmonypy.run_harmony(components, table, ["batch"], random_state=seed, verbose=False).Z_corr
    rows = moved if moved.shape == components.shape else moved.T  # before its version 1 cells were columns
    return np.ascontiguousarray(rows, np.float32)


def _scvi(counts: sp.csr_matrix, batch: NDArray[np.str_], seed: int) -> NDArray[np.float32]:
    import scvi

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lightning, about how scvi-tools calls it
        scvi.settings.seed = seed
        cells = AnnData(counts, obs=pd.DataFrame({"batch": batch}, index=np.arange(len(batch)).astype(str)))
        scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
        model = scvi.model.SCVI(cells)
        model.train(enable_progress_bar=False)
        return np.asarray(model.get_latent_representation(), np.float32)
