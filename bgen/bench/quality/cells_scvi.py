"""scvi-tools' side of ``bgen bench cells``, in a process of its own: ``python cells_scvi.py JSON``.

This file runs in a Python that has scvi-tools, where bgen need not be, so it imports nothing of bgen. SCVI is trained
with its defaults; then cells are drawn in two ways: latents from the prior, with the library sizes of training cells,
and latents from the posteriors of training cells (the aggregate posterior), with the library size of that very cell.

Axes: n cells, G genes, D latent size.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(folder: Path, n: int, epochs: int | None, threads: int, seed: int) -> dict[str, object]:
    """Train on ``train.npz``, write ``prior.npz`` and ``posterior.npz`` (counts ``[n, G]``, CSR), return the facts."""
    import anndata
    import numpy as np
    import scipy.sparse as sp
    import scvi
    import torch

    scvi.settings.seed = seed
    torch.set_num_threads(threads)
    counts = sp.csr_matrix(sp.load_npz(folder / "train.npz"))
    adata = anndata.AnnData(counts)
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata)
    begin = time.perf_counter()
    model.train(max_epochs=epochs, accelerator="cpu", enable_progress_bar=False)
    seconds = time.perf_counter() - begin
    module = model.module.eval()
    cells = np.random.default_rng(seed).choice(counts.shape[0], n, replace=False)
    batch_index = torch.zeros(n, 1, dtype=torch.long)
    with torch.no_grad():
        found = module.inference(torch.from_numpy(counts[cells].toarray()), batch_index)
        latents = {"prior": torch.randn_like(found["z"]), "posterior": found["z"]}
        rates = {}
        for name, z in latents.items():
            begin = time.perf_counter()
            made = module.generative(z, found["library"], batch_index)["px"].sample()
            rates[name] = n / (time.perf_counter() - begin)
            sp.save_npz(folder / f"{name}.npz", sp.csr_matrix(made.numpy()))
    return {
        "version": scvi.__version__,
        "epochs": len(model.history["elbo_train"]),
        "seconds": seconds,
        "cells_per_s": rates,
    }


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    print(json.dumps(main(Path(arguments.pop("folder")), **arguments)), flush=True)
