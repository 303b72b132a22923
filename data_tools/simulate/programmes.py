"""Cells that are made of gene programmes which are known by name: pathways, or regulators with signs.

    log mean_g = base_g + sum_p l_pg a_p,   a_p ~ N(m_tp, 0.5) in a cell of type t

Each gene belongs to one programme or to none. A pathway moves all of its genes the same way; a regulator moves half of
them up and half down, and is a gene itself. Few molecules are counted, so that a gene by itself says little of its
programme and all of its genes together say much: whoever knows which genes belong together is ahead.

Axes: N cells, G genes, P programmes, T cell types.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from bgen.errors import UserError, nearest
from bgen.files import write_whole
from data_tools.simulate.truth import require_size

TYPES = 8
SCATTER = 0.5
"""Standard deviation of a programme's activity among cells of one type."""
LIBRARY, LIBRARY_SPREAD = 250.0, 0.5
"""Median library size, and the standard deviation of its logarithm."""


@dataclass(frozen=True)
class Programmes:
    """A named size; ``members`` is the number of genes of a programme."""

    cells: int
    genes: int
    programmes: int
    members: int
    signed: bool


PROGRAMMES = {
    "pathways": Programmes(1500, 600, 32, 15, signed=False),
    "regulators": Programmes(1500, 600, 32, 15, signed=True),
}


def simulate_programmes(
    preset: str = "pathways", *, cells: int | None = None, genes: int | None = None, seed: int = 0
) -> anndata.AnnData:
    """Simulate cells of programmes; the same arguments give the same cells, bit for bit.

    Parameters
    ----------
    preset
        "pathways" or "regulators" (both 1,500 x 600, 32 programmes of 15 genes).
    cells, genes
        Other sizes than the preset's.
    seed
        Seed of everything.

    Returns
    -------
    AnnData with integer counts (float32 CSR) in X and obs cell_type; in ``uns['truth']``: ``programme [G]``, the number
    of each gene's programme or -1, ``loading [G]``, ``name [P]``, and the mean activities of the types ``[T, P]``; in
    ``obsm['truth']`` the cells' activities ``[N, P]``.

    Raises
    ------
    UserError
        If the preset is unknown, or the size is too small.
    """
    if preset not in PROGRAMMES:
        raise UserError(f"there is no preset '{preset}'.{nearest(preset, PROGRAMMES)}")
    size = PROGRAMMES[preset]
    N, G, P = (size.cells if cells is None else cells), (size.genes if genes is None else genes), size.programmes
    require_size(preset, N, G, (100, P * (size.members + size.signed)), seed)
    structure, sampling = np.random.default_rng([seed, 4]), np.random.default_rng([seed, 5])
    width = max(4, len(str(G)))
    names = np.array([f"G{number:0{width}d}" for number in range(1, G + 1)], dtype=object)
    dealt = structure.permutation(G)
    programme = np.full(G, -1)
    programme[dealt[: P * size.members]] = np.repeat(np.arange(P), size.members)
    loading = np.where(programme >= 0, structure.uniform(0.3, 0.9, G), 0.0)
    if size.signed:
        loading[dealt[: P * size.members : 2]] *= -1
    named = [f"PATHWAY_{p + 1}" for p in range(P)] if not size.signed else list(names[dealt[-P:]])
    mean = structure.choice([-0.8, 0.0, 0.8], (TYPES, P), p=[0.2, 0.6, 0.2])
    base = structure.normal(0, 1.0, G)
    theta = np.exp(structure.normal(np.log(4.0), 0.4, G))

    of_type = sampling.integers(TYPES, size=N)
    activity = mean[of_type] + SCATTER * sampling.standard_normal((N, P))
    level = np.exp(base + np.where(programme >= 0, activity[:, programme] * loading, 0.0))
    library = np.exp(sampling.normal(np.log(LIBRARY), LIBRARY_SPREAD, N))
    rate = library[:, None] * level / level.sum(1, keepdims=True)
    counts = sampling.poisson(sampling.standard_gamma(np.broadcast_to(theta, rate.shape)) * (rate / theta))
    obs = pd.DataFrame({"cell_type": pd.Categorical([f"type_{number + 1}" for number in of_type])})
    obs.index = pd.Index([f"cell_{i:0{len(str(N))}d}" for i in range(1, N + 1)])
    uns = {
        "organism": "synthetic",
        "simulation": {"preset": preset, "seed": seed, "cells": N, "genes": G, "version": 1},
        "truth": {"programme": programme, "loading": loading, "name": np.array(named, dtype=object), "mean": mean},
    }
    var = pd.DataFrame(index=pd.Index(names))
    return anndata.AnnData(
        sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=var, uns=uns, obsm={"truth": activity}
    )


def write_known(adata: anndata.AnnData, path: Path) -> None:
    """Write what is known of the programmes: gene sets if ``path`` ends in .gmt, else edges with their signs (CSV).

    Raises
    ------
    UserError
        If the cells are not made of programmes.
    """
    truth = adata.uns.get("truth", {})
    if "programme" not in truth:
        raise UserError(f"only the presets {', '.join(PROGRAMMES)} have programmes that can be written.")
    genes, programme, loading = np.asarray(adata.var_names), truth["programme"], truth["loading"]
    if path.suffix == ".gmt":
        lines = ["\t".join([name, "", *genes[programme == p]]) for p, name in enumerate(truth["name"])]
    else:
        some = np.flatnonzero(programme >= 0)
        edges = zip(truth["name"][programme[some]], genes[some], np.sign(loading[some]), strict=True)
        lines = ["source,target,weight", *(f"{source},{target},{sign:g}" for source, target, sign in edges)]
    write_whole(path, ("\n".join(lines) + "\n").encode())
