"""From a sequence to counts, end to end: a VAE's gene table made from vectors, and genes that no training saw.

A VAE is trained on the genes that are not held out; encoder and decoder know them by their vectors. A gene that was
held out is then added as a user would (:mod:`bgen.tasks.extend`), by its vector alone. Decoding the cells' latent
states tells where it is expressed, which is compared with its counts.

Axes: N cells, G genes, A genes of the training, T groups of cells, F size of a vector.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from bgen.arrays import F32, F64
from bgen.bench.quality.compared import Figures
from bgen.bench.quality.representations import AT_ONCE
from bgen.bench.runs import store_of, train_whole
from bgen.data.cells_in_memory import MemoryCells
from bgen.genes.profiles import profiles
from bgen.models.vae.vae import VAE
from bgen.order.keys import hash_keys
from bgen.tasks.extend import extend_model
from bgen.tasks.gene_vectors import Counted, write_vectors
from bgen.tasks.load import load_model

WIDEST = 32
"""Numbers to which vectors are reduced (``vectors.size``)."""


def through_the_table(
    counted: Counted, genes: NDArray[np.int64], vectors: F32, held: NDArray[np.bool_], work: Path, seed: int, steps: int
) -> Figures:
    """Return R2 over genes that were held out: of the first component of their deviations, and of all deviations.

    Parameters
    ----------
    genes, vectors
        Genes with a vector ``[G, F]``.
    held
        Those of them that no training sees ``[G]``; the components are those of the others.
    work
        A folder to train in, which is removed.
    """
    ids = counted.genes["id"].to_numpy(str)[genes]
    some = counted.counts[:, genes[~held]]
    whole = np.asarray(some.sum(1)).ravel() > 0
    var = counted.genes.iloc[genes[~held]].set_index("id")[["symbol"]].rename(columns={"symbol": "gene_symbol"})
    organism = {"organism": counted.organism} if counted.organism else {}
    store = store_of(AnnData(some[whole], var=var, uns=organism), work, seed)
    write_vectors(work / "vectors.csv", ids.tolist(), vectors)
    table = {"files": [str(work / "vectors.csv")], "size": min(WIDEST, vectors.shape[1])}
    settings = [f"data.store={store}", f"seed={seed}", f"train.steps={steps}", f"out={work / 'vae'}"]
    settings += ["track.mlflow=false", "track.progress=false", "vae.fit_levels=false"]
    settings += [
        f"vae.encoder={{name: gene_set, vectors: {table}}}",
        f"vae.decoder={{name: gene_table, vectors: {table}}}",
    ]
    train_whole("vae", settings)
    model = load_model(work / "vae" / "model", "cpu")
    assert isinstance(model.saved.vae, VAE)
    read = model.read(AnnData(some[whole], var=var, uns=organism))
    extended = extend_model(model.saved, ids[held].tolist(), say=lambda _: None)
    rows = pd.Index(extended.genes["id"].astype(str)).get_indexer(pd.Index(ids[held]))
    assert (rows >= 0).all(), "each has a vector"
    labels = counted.labels[whole]
    told = profiles(decoded(extended.vae, read.counts), labels)
    real = profiles(counted.counts[whole], labels)
    shutil.rmtree(work)
    return _figures(real.deviation[genes], told.deviation[rows], held)


@torch.no_grad()
def decoded(vae: VAE, counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return the share of each of a VAE's genes in cells with ``counts [N, A]`` of the first A of them."""
    wide = sparse.csr_matrix((counts.data, counts.indices, counts.indptr), (counts.shape[0], vae.n_genes))
    cells, shares = MemoryCells(wide, {}), []
    for start in range(0, len(cells), AT_ONCE):
        rows = np.arange(start, min(start + AT_ONCE, len(cells)))
        mean, _ = vae.encode(cells.batch(rows, hash_keys(0, rows)))
        shares.append(vae.decode(mean, torch.ones(len(rows)), {}).mean.numpy())
    return sparse.csr_matrix(np.concatenate(shares))


def _figures(real: F64, told: F64, held: NDArray[np.bool_]) -> Figures:
    """Return R2 of deviations ``told [held, T]`` beside the real ones ``[G, T]``."""
    mean = real[~held].mean(0)
    axis = np.linalg.svd(real[~held] - mean, full_matrices=False)[2][0]
    true, guess = real[held] - mean, told - mean
    return {
        "component 1": float(1 - np.square((guess - true) @ axis).sum() / np.square(true @ axis).sum()),
        "all deviations": float(1 - np.square(guess - true).sum() / np.square(true).sum()),
    }
