"""Several columns of a file may be of one gene."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from bgen.data.loader import CountReader
from bgen.store.store import Store
from data_tools.building.build import build
from data_tools.check.check import CheckOptions, check

N_GENES = 700


def test_columns_of_one_gene_are_added_up(tmp_path: Path) -> None:
    counts = sp.random(300, N_GENES, density=0.05, format="csr", rng=np.random.default_rng(4), dtype=np.float32)
    counts.data = np.ceil(300 * counts.data)
    counts = sp.csr_matrix(sp.hstack([np.ones((300, 1), np.float32), counts[:, 1:]]))  # no cell is empty
    obs = pd.DataFrame(index=[f"c{i}" for i in range(300)])
    ids = [f"GENE{i // 2:011d}" for i in range(N_GENES)]
    adata = anndata.AnnData(
        counts, obs=obs, var=pd.DataFrame({"gene_id": ids}, index=[f"v{i}" for i in range(N_GENES)])
    )
    adata.uns["organism"] = "synthetic"
    adata.write_h5ad(tmp_path / "twice.h5ad")
    report = check([tmp_path / "twice.h5ad"], CheckOptions(gene_column="gene_id", merge_duplicates="sum"))
    build(report, tmp_path / "store", created_by="test")
    store = Store(tmp_path / "store")
    batch = CountReader(store).read_cells(np.arange(300))
    got = sp.csr_matrix((batch.counts.numpy(), batch.indices.numpy(), batch.indptr.numpy()), shape=(300, N_GENES // 2))
    _, rows = store.source_of(np.arange(300))
    genes = np.array([int(gene[4:]) for gene in store.genes["id"]])
    wanted = (counts[:, 0::2] + counts[:, 1::2])[rows][:, genes]
    assert abs(got - wanted).nnz == 0
    assert store.genes["cells"].tolist() == np.diff(wanted.tocsc().indptr).tolist()
