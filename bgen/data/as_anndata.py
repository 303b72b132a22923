"""Cells of a store as AnnData."""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from bgen.arrays import I64
from bgen.data.loader import CountReader
from bgen.names import index_name
from bgen.order.cells import numbers
from bgen.order.sample import SCATTERED
from bgen.store.store import Store


def read_anndata(store: Store, cells: I64) -> AnnData:
    """Return cells of a store: integer counts (CSR float32) in X, all columns in obs, the gene table in var.

    Parameters
    ----------
    cells
        int64: numbers of the cells, in the order wanted.
    """
    batch = CountReader(store).read_cells(cells)
    counts = sp.csr_matrix(
        (batch.counts.numpy(), batch.indices.numpy(), batch.indptr.numpy()), shape=(len(cells), batch.n_genes)
    )
    obs = pd.DataFrame(index=pd.Index(store.names(cells=cells), name=index_name("cell", store.manifest.columns)))
    for name in store.manifest.columns:
        column, values = store.column(name, cells=cells)
        if column.kind == "category":
            obs[name] = pd.Categorical.from_codes(values.astype(np.int64), pd.Index(column.categories))
        else:
            obs[name] = values
    var = store.genes.set_index("id").rename_axis("gene")
    adata = AnnData(counts, obs=obs, var=var)
    adata.uns["bgen"] = {
        "store": store.fingerprint,
        "organism": store.manifest.organism,
        "roles": dict(store.manifest.roles),
        "units": dict(store.manifest.units),
    }
    return adata


def read_split(store: Store, split: str, limit: int | None = None, seed: int = 0) -> AnnData:
    """Return the cells of a split, or a seeded sample of at most ``limit`` of them."""
    every = store.split(split)
    if limit is not None and len(every) > SCATTERED * limit:  # few chunks of a large store are read
        return read_anndata(store, store.sample(every, limit, seed))
    cells = numbers(every)
    if limit is not None and len(cells) > limit:
        cells = np.sort(np.random.default_rng(seed).choice(cells, limit, replace=False))
    return read_anndata(store, cells)
